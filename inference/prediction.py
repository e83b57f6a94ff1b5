r"""Predictive distributions: mixtures of the declared likelihood over draws of theta, in bounded memory.

.. math:: p(y \mid x, D) = \sum_s w_s \, p(y \mid x, \theta_s), \qquad
          \mathrm{Var}[y] = \underbrace{E_s[\mathrm{Var}(y|\theta_s)]}_{\text{aleatoric}}
                          + \underbrace{\mathrm{Var}_s(E[y|\theta_s])}_{\text{epistemic}}

``y`` includes the observation noise; ``f`` is the likelihood's location (loc, logits, log rate). Moments are computed
once, chunk by chunk; what needs every component (quantiles, densities, samples) is recomputed on demand unless the
components are small enough to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.special
import torch
from torch import Tensor
from torch.func import vmap

from inference.data import Tree, chunks, index, num_data, shapes
from inference.errors import CapabilityError
from inference.graph import capture
from inference.observation import LikelihoodFamily
from inference.target import Target

Params = dict[str, Tensor]

# Buffers past a core's cache cost page faults: small chunks were two to four times faster when measured.
_CHUNK_ELEMENTS = 400_000
_MAX_ROWS = 2_048
_KEEP_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Moments:
    """Moments of y and f at some inputs, each (n, ...); variances, not standard deviations."""

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    f_mean: Tensor
    f_variance: Tensor


class Source(Protocol):
    """Where a prediction's mixture components come from."""

    weights: Tensor
    family: LikelihoodFamily

    def params(self, rows: slice) -> Params:
        """Parameters of every component at some inputs, each (S, n, ...)."""
        ...

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments at the same inputs."""
        ...


class DrawSource:
    """Components from draws of theta pushed through the model.

    Args:
        target: The model.
        thetas: Draws, (S, P).
        weights: Mixture weights, (S,), summing to one.
        x: Inputs, every leaf (N, ...).
        chunk_size: Draws that advance together; None: sized for the cache.
    """

    def __init__(self, target: Target, thetas: Tensor, weights: Tensor, x: Tree, chunk_size: int | None = None) -> None:
        self.target, self.thetas, self.weights, self.x = target, thetas, weights, x
        self.family = target.family(index(x, slice(0, 1)))
        self.chunk_size = chunk_size

    def params(self, rows: slice) -> Params:
        """Parameters of every draw at some inputs, each (S, n, ...)."""
        x = index(self.x, rows)
        total = self.thetas.shape[0]
        size = min(self.chunk_size or self._chunk(x), total)
        pieces = []
        with torch.no_grad():
            for part in chunks(total, size):
                pieces.append(self._program(part.stop - part.start, x)(self.thetas[part], x))
        return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments by the law of total variance over the draws."""
        return mixture_moments(self.family, params, self.weights)

    def _program(self, num: int, x: Tree) -> Callable[..., Params]:
        key = ("predict", num, shapes(x), self.target.kept)
        cache = self.target.programs.cache
        if self.target.at is not None:  # the fixed part is a constant of the graph
            return lambda thetas, inputs: vmap(self.target.parameters, in_dims=(0, None))(thetas, inputs)
        if key not in cache:
            self.target.parameters(self.thetas[0], x)
            cache[key] = capture(vmap(self.target.parameters, in_dims=(0, None)), self.thetas[:num], x)
        return cache[key]

    def _chunk(self, x: Tree) -> int:
        self.target.parameters(self.thetas[0], x)
        program = self.target.programs.recorded_parameters(x)
        values = [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
        widest = max((v.numel() for v in values if isinstance(v, Tensor)), default=1)
        return max(1, _CHUNK_ELEMENTS // max(widest, 1))


def mixture_moments(family: LikelihoodFamily, params: Params, weights: Tensor) -> Moments:
    """Law of total variance over mixture components.

    Args:
        family: The likelihood.
        params: Component parameters, each (S, n, ...).
        weights: (S,).

    Returns:
        Moments of y (of the one-hot y for class labels) and f.
    """
    if family.kind == "categorical":
        means = params["logits"].softmax(-1)
        variances = means * (1 - means)
    else:
        base = family.cls(**params, validate_args=False)
        means, variances = base.mean, base.variance
    mean, epistemic = weighted_moments(means, weights)
    f_mean, f_variance = weighted_moments(location(family, params), weights)
    return Moments(mean, average(variances, weights), epistemic, f_mean, f_variance)


def location(family: LikelihoodFamily, params: Params) -> Tensor:
    """The latent function f: loc, logits or log rate; the mean of any other family; (S, n, ...)."""
    if "loc" in params:
        return params["loc"]
    if "logits" in params:
        return params["logits"]
    if "rate" in params:
        return params["rate"].log()
    return family.cls(**params, validate_args=False).mean


def average(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the first dimension."""
    return torch.tensordot(weights, values, dims=1)


def weighted_moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and variance (divided by the weight sum, not S - 1) over the first dimension."""
    mean = average(values, weights)
    return mean, average((values - mean).square(), weights)


class Prediction:
    """Predictive distribution at given inputs; arrays have the inputs first, then the target's own dimensions.

    Attributes:
        mean: E[y], (N, ...); class probabilities for class labels.
        aleatoric_variance: Expected noise variance, (N, ...).
        epistemic_variance: Variance of E[y | theta] over the posterior, (N, ...).
        f_mean: Posterior mean of the latent function, (N, ...).
        f_variance: Posterior variance of the latent function, without noise, (N, ...).

    Args:
        source: Supplies the mixture components.
        num_data: Number of inputs N.
        seed: Seed of :meth:`sample`.
    """

    def __init__(self, source: Source, num_data: int, seed: int = 0) -> None:
        self._source, self._seed = source, seed
        self._weights = source.weights
        self._log_weights = source.weights.log()
        self.family = source.family
        self._rows = list(chunks(num_data, min(num_data, _MAX_ROWS)))
        self._kept: list[Params] | None = None
        self.num_data = num_data
        self._compute_moments()

    def _compute_moments(self) -> None:
        found, kept, size = [], [], 0
        entropies = []
        for rows in self._rows:
            params = self._source.params(rows)
            found.append(self._source.moments(rows, params))
            if self.family.is_classification:
                entropies.append(self._entropies(params))
            size += sum(p.numel() * p.element_size() for p in params.values())
            if size <= _KEEP_BYTES:
                kept.append(params)
        if size <= _KEEP_BYTES:
            self._kept = kept
        self.mean = torch.cat([m.mean for m in found])
        self.aleatoric_variance = torch.cat([m.aleatoric for m in found])
        self.epistemic_variance = torch.cat([m.epistemic for m in found])
        self.f_mean = torch.cat([m.f_mean for m in found])
        self.f_variance = torch.cat([m.f_variance for m in found])
        if entropies:
            self._probs = torch.cat([e[0] for e in entropies])
            self._aleatoric_entropy = torch.cat([e[1] for e in entropies])

    @property
    def num_components(self) -> int:
        """Number S of mixture components."""
        return self._weights.shape[0]

    @property
    def variance(self) -> Tensor:
        """Variance of y: aleatoric plus epistemic, (N, ...)."""
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of y, noise included, (N, ...)."""
        return self.variance.sqrt()

    # -- class labels ------------------------------------------------------------------------------------------------

    @property
    def probs(self) -> Tensor:
        """Class probabilities averaged over the posterior, (N, K)."""
        self._need_classes("probs")
        return self._probs

    @property
    def labels(self) -> Tensor:
        """Most probable class, (N,)."""
        return self.probs.argmax(-1)

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty H[E p], (N,) nats."""
        return entropy(self.probs)

    @property
    def aleatoric_entropy(self) -> Tensor:
        """Expected entropy E H[p], (N,) nats."""
        self._need_classes("aleatoric_entropy")
        return self._aleatoric_entropy

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part of the entropy, H[E p] - E H[p] >= 0, (N,) nats."""
        return (self.entropy - self.aleatoric_entropy).clamp(min=0)

    def component_probs(self) -> Tensor:
        """Class probabilities of every draw, (S, N, K): allocates all of it."""
        self._need_classes("component_probs")
        return torch.cat([self._class_probs(p) for p in self._all_params()], 1)

    def component_means(self) -> Tensor:
        """E[y | theta_s] of every draw, (S, N, ...): allocates all of it."""
        if self.family.is_classification:
            return self.component_probs()
        return torch.cat([self.family.cls(**p, validate_args=False).mean for p in self._all_params()], 1)

    def component_functions(self) -> Tensor:
        """The latent function f of every draw, (S, N, ...): allocates all of it."""
        return torch.cat([location(self.family, p) for p in self._all_params()], 1)

    # -- densities and quantiles -------------------------------------------------------------------------------------

    def log_prob(self, y: Tensor) -> Tensor:
        r"""Log density of the mixture, :math:`\log \sum_s w_s p(y_n|x_n,\theta_s)`.

        Args:
            y: Targets, (N, ...).

        Returns:
            (N,) nats per datum.
        """
        self._check_targets(y)
        parts = []
        for rows, params in zip(self._rows, self._all_params(), strict=True):
            log_prob = self.family.distribution(params).log_prob(y[rows])  # (S, n)
            parts.append(torch.logsumexp(log_prob + self._log_weights[:, None], 0))
        return torch.cat(parts)

    def component_log_prob(self, y: Tensor) -> Tensor:
        """Log density of every component, (S, N) nats per datum: allocates all of it."""
        self._check_targets(y)
        pairs = zip(self._rows, self._all_params(), strict=True)
        return torch.cat([self.family.distribution(p).log_prob(y[rows]) for rows, p in pairs], 1)

    def gaussian_log_prob(self, y: Tensor) -> Tensor:
        """Log density of the Gaussian with this prediction's mean and variance (published tables mix the two).

        Args:
            y: Targets, (N, ...).

        Returns:
            (N,) nats per datum, summed over the target's own dimensions.
        """
        self._need_regression("gaussian_log_prob")
        self._check_targets(y)
        log_prob = torch.distributions.Normal(self.mean, self.stddev, validate_args=False).log_prob(y)
        return log_prob.reshape(log_prob.shape[0], -1).sum(-1)

    def cdf(self, y: Tensor) -> Tensor:
        """Distribution function of the mixture at y, elementwise for vector targets, (N, ...).

        Args:
            y: Points, (N, ...).

        Returns:
            Probabilities, (N, ...).
        """
        self._need_regression("cdf")
        self._check_targets(y)
        pairs = zip(self._rows, self._all_params(), strict=True)
        return torch.cat([average(component_cdf(self.family, p, y[rows]), self._weights) for rows, p in pairs])

    def quantile(self, q: float) -> Tensor:
        """Quantile of the mixture (not of a Gaussian fitted to it), elementwise for vector targets.

        Args:
            q: Probability in (0, 1).

        Returns:
            (N, ...).

        Raises:
            ValueError: If q is not inside (0, 1).
        """
        self._need_regression("quantile")
        if not 0 < q < 1:
            raise ValueError(f"`q` must be inside (0, 1), got {q}")
        return torch.cat([mixture_quantile(self.family, p, self._weights, q) for p in self._all_params()])

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval of the mixture.

        Args:
            level: Probability inside, in (0, 1).

        Returns:
            Lower and upper ends, each (N, ...).

        Raises:
            ValueError: If level is not inside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must be inside (0, 1), got {level}")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def sample(self, num_samples: int = 100, seed: int | None = None) -> Tensor:
        """Draw targets, noise included; one draw uses the same theta at every input.

        Args:
            num_samples: Number of draws S.
            seed: Random seed; that of the prediction by default.

        Returns:
            (S, N, ...).
        """
        generator = torch.Generator().manual_seed(self._seed if seed is None else seed)
        weights = self._weights.cpu()
        uniform = bool((weights - weights[0]).abs().max() < 1e-12)
        if uniform and num_samples == weights.shape[0]:
            chosen = torch.arange(num_samples)
        else:
            chosen = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        parts = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for params in self._all_params():
                picked = {k: v[chosen.to(v.device)] for k, v in params.items()}
                parts.append(self.family.distribution(picked).sample())
        return torch.cat(parts, 1)

    # -- private -------------------------------------------------------------------------------------------------------

    def _all_params(self) -> Any:
        return self._kept if self._kept is not None else (self._source.params(rows) for rows in self._rows)

    def _class_probs(self, params: Params) -> Tensor:
        if self.family.kind == "categorical":
            return params["logits"].softmax(-1)
        one = params["logits"].sigmoid()
        return torch.stack([1 - one, one], -1)

    def _entropies(self, params: Params) -> tuple[Tensor, Tensor]:
        probs = self._class_probs(params)
        return average(probs, self._weights), average(entropy(probs), self._weights)

    def _need_classes(self, name: str) -> None:
        if not self.family.is_classification:
            raise CapabilityError(f"`{name}` needs class labels (Categorical or Bernoulli), but y is {self.family.cls.__name__}")

    def _need_regression(self, name: str) -> None:
        if self.family.is_classification:
            raise CapabilityError(f"`{name}` needs an ordered target, but y is {self.family.cls.__name__}; use `.probs`")

    def _check_targets(self, y: Tensor) -> None:
        expected = (self.num_data, *self.family.data_shape)
        if tuple(y.shape) != expected:
            raise ValueError(f"y must have shape {expected}, one target per input, got {tuple(y.shape)}")


def entropy(probs: Tensor) -> Tensor:
    """Entropy of the last dimension in nats, with 0 log 0 = 0."""
    return torch.special.entr(probs).sum(-1)


def component_cdf(family: LikelihoodFamily, params: Params, y: Tensor) -> Tensor:
    """Distribution function of every component.

    Args:
        family: The likelihood.
        params: Component parameters, each (S, n, ...).
        y: Points, broadcastable to (S, n, ...).

    Returns:
        (S, n, ...).
    """
    if family.kind == "normal":
        return torch.special.ndtr((y - params["loc"]) / params["scale"])
    if family.kind == "student_t":
        z = ((y - params["loc"]) / params["scale"]).cpu().numpy()
        return torch.as_tensor(scipy.special.stdtr(params["df"].cpu().numpy(), z)).to(params["loc"])
    if family.kind == "poisson":
        counts = np.floor(y.cpu().numpy())
        below = scipy.special.pdtr(np.maximum(counts, 0), params["rate"].cpu().numpy())
        return torch.as_tensor(np.where(counts < 0, 0.0, below)).to(params["rate"])
    return family.cls(**params, validate_args=False).cdf(y)


def mixture_quantile(family: LikelihoodFamily, params: Params, weights: Tensor, q: float) -> Tensor:
    """Quantile of a mixture by bisection on its distribution function, exact to a part in 2^50 of the bracket.

    Args:
        family: The likelihood.
        params: Component parameters, each (S, n, ...).
        weights: (S,).
        q: Probability in (0, 1).

    Returns:
        (n, ...); the smallest integer reaching q for counts.
    """
    base = family.cls(**params, validate_args=False)
    spread = base.stddev
    spread = torch.where(torch.isfinite(spread), spread, 10 * params["scale"] if "scale" in params else spread)
    # Chebyshev's inequality: no quantile is further than sd / sqrt(tail) from its component's mean; doubled for safety.
    reach = 2 * spread / math.sqrt(min(q, 1 - q))
    low, high = (base.mean - reach).amin(0), (base.mean + reach).amax(0)
    if family.kind == "student_t":
        low, high = _widen(family, params, weights, q, low, high)
    for _ in range(50):
        middle = (low + high) / 2
        below = average(component_cdf(family, params, middle), weights) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.floor() if family.kind == "poisson" else (low + high) / 2


def _widen(family: LikelihoodFamily, params: Params, weights: Tensor, q: float, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Grow a bracket until it holds the quantile: heavy tails have no variance to bound it."""
    for _ in range(60):
        width = high - low
        short = average(component_cdf(family, params, low), weights) > q
        long = average(component_cdf(family, params, high), weights) < q
        if not bool(short.any() | long.any()):
            break
        low, high = torch.where(short, low - width, low), torch.where(long, high + width, high)
    return low, high
