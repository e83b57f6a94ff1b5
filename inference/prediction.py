r"""Predictive distributions: mixtures of the declared likelihood over draws of theta, in bounded memory.

.. math:: p(y \mid x, D) = \sum_s w_s \, p(y \mid x, \theta_s), \qquad
          \mathrm{Var}[y] = \underbrace{E_s[\mathrm{Var}(y|\theta_s)]}_{\text{aleatoric}}
                          + \underbrace{\mathrm{Var}_s(E[y|\theta_s])}_{\text{epistemic}}

``y`` includes the observation noise; ``f`` is the likelihood's location (loc, logits, log rate). Moments are computed
once, chunk by chunk; what needs every component (quantiles, densities, samples) is recomputed on demand unless the
components are small enough to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap

from inference.chunking import MAX_ROWS, draws_per_chunk, even, rows_per_chunk
from inference.data import Tree, chunks, index, num_data, shapes
from inference.errors import CapabilityError
from inference.graph import capture
from inference.mixtures import (
    Moments,
    Params,
    average,
    component_cdf,
    entropy,
    location,
    mixture_moments,
    mixture_quantile,
)
from inference.observation import LikelihoodFamily
from inference.target import Target

_KEEP_BYTES = 128 * 2**20


class Source(Protocol):
    """Where a prediction's mixture components come from."""

    weights: Tensor
    family: LikelihoodFamily
    rows: int  # inputs per chunk

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
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"`chunk_size` must be >= 1, got {chunk_size}")
        self.target, self.thetas, self.weights, self.x = target, thetas, weights, x
        self.chunk_size = chunk_size
        self.num_data = num_data(x)
        local = bool(target.programs.traced.local_sites)  # such a model runs on all of its data or not at all
        rows = self.num_data if local else min(self.num_data, MAX_ROWS)
        first = index(x, slice(0, rows))
        with torch.no_grad():
            found = target.parameters(thetas[0], first)
        self.family = target.family(first)
        self.rows = rows if local else even(self.num_data, rows_per_chunk(rows, thetas.shape[0], found))

    def params(self, rows: slice) -> Params:
        """Parameters of every draw at some inputs, each (S, n, ...)."""
        # The last chunk is taken full and cut afterwards, of rows and of draws alike: one recorded graph serves all.
        extra = max(0, min(self.rows, self.num_data) - (rows.stop - rows.start))
        extra = min(extra, rows.start)
        x = index(self.x, slice(rows.start - extra, rows.stop))
        total = self.thetas.shape[0]
        size = even(total, self.chunk_size or self._chunk(x))
        program = self._program(size, x)
        out: Params = {}  # filled in place: small pieces kept beside large buffers fragment the heap
        with torch.no_grad():
            for part in chunks(total, size):
                start = min(part.start, total - size)
                found = program(self.target.expand(self.thetas[start : start + size]), x)
                for name, value in found.items():
                    if name not in out:
                        out[name] = value.new_empty((total, value.shape[1] - extra, *value.shape[2:]))
                    out[name][part] = value[part.start - start :, extra:]
        return out

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments by the law of total variance over the draws."""
        return mixture_moments(self.family, params, self.weights)

    def _program(self, num: int, x: Tree) -> Callable[..., Params]:
        programs = self.target.programs
        key = ("predict", num, shapes(x), self.thetas.device)
        if key not in programs.cache:
            example = self.target.expand(self.thetas[:num])
            programs.parameters(example[0], x)  # recorded outside the vmap
            programs.cache[key] = capture(vmap(programs.parameters, in_dims=(0, None)), example, x)
        return programs.cache[key]

    def _chunk(self, x: Tree) -> int:
        return draws_per_chunk(self.target.programs.recorded_parameters(x))


class Prediction:
    """Predictive distribution at given inputs; arrays have the inputs first, then the target's own dimensions.

    Attributes:
        mean: E[y], (N, ...); class probabilities for class labels.
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
        self._rows = list(chunks(num_data, source.rows))
        self.num_data = num_data
        self._compute_moments()

    def _compute_moments(self) -> None:
        kept, size = [], 0
        out: dict[str, Tensor] = {}  # filled in place: small results kept between large buffers fragment the heap
        for rows in self._rows:
            params = self._source.params(rows)
            size += sum(p.numel() * p.element_size() for p in params.values())
            kept = [*kept, params] if size <= _KEEP_BYTES else []
            found = vars(self._source.moments(rows, params)).copy()
            if self.family.is_classification:
                found["probs"], found["entropy"] = self._entropies(rows, params)
            for name, value in found.items():
                if name not in out:
                    out[name] = value.new_empty((self.num_data, *value.shape[1:]))
                out[name][rows] = value
        self._kept = kept or None
        self.mean, self._aleatoric, self._epistemic = out["mean"], out["aleatoric"], out["epistemic"]
        self.f_mean, self.f_variance = out["f_mean"], out["f_variance"]
        if self.family.is_classification:
            self._probs, self._aleatoric_entropy = out["probs"], out["entropy"]

    @property
    def num_components(self) -> int:
        """Number S of mixture components."""
        return self._weights.shape[0]

    @property
    def aleatoric_variance(self) -> Tensor:
        """Expected noise variance, (N, ...)."""
        return self._aleatoric

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance of E[y | theta] over the posterior, (N, ...)."""
        return self._epistemic

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
        self._check_labels(y)
        parts = []
        for rows, params in zip(self._rows, self._all_params(), strict=True):
            log_prob = self.family.distribution(params).log_prob(y[rows])  # (S, n)
            parts.append(torch.logsumexp(log_prob + self._log_weights[:, None], 0))
        return torch.cat(parts)

    def component_log_prob(self, y: Tensor) -> Tensor:
        """Log density of every component, (S, N) nats per datum: allocates all of it."""
        self._check_labels(y)
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
        y = y.to(self.mean.dtype)  # counts are integers
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

        Raises:
            ValueError: If ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be >= 1, got {num_samples}")
        generator = torch.Generator().manual_seed(self._seed if seed is None else seed)
        weights = self._weights.cpu()
        uniform = bool((weights - weights[0]).abs().max() < 1e-12)
        if uniform and num_samples == weights.shape[0]:
            chosen = torch.arange(num_samples)
        else:
            chosen = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        parts = []
        device = self._weights.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
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

    def _entropies(self, rows: slice, params: Params) -> tuple[Tensor, Tensor]:
        probs = self._class_probs(params)
        return average(probs, self._weights), average(entropy(probs), self._weights)

    def _need_classes(self, name: str) -> None:
        if not self.family.is_classification:
            raise CapabilityError(
                f"`{name}` needs class labels (Categorical or Bernoulli), but y is {self.family.cls.__name__}"
            )

    def _need_regression(self, name: str) -> None:
        if self.family.is_classification:
            raise CapabilityError(
                f"`{name}` needs an ordered target, but y is {self.family.cls.__name__}; use `.probs`"
            )

    def _check_targets(self, y: Tensor) -> None:
        expected = (self.num_data, *self.family.data_shape)
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}; convert it with torch.as_tensor")
        if tuple(y.shape) != expected:
            raise ValueError(f"y must have shape {expected}, one target per input, got {tuple(y.shape)}")
        if y.is_floating_point() and bool(y.isnan().any()):
            raise ValueError(f"y holds NaN in {int(y.isnan().sum())} places; score only the inputs with known targets")

    def _check_labels(self, y: Tensor) -> None:
        self._check_targets(y)
        if self.family.kind in ("categorical", "bernoulli"):
            count = self.probs.shape[-1]
            if bool(((y < 0) | (y >= count) | (y != y.floor())).any()):
                raise ValueError(f"y must hold class labels 0 to {count - 1}, got values from {y.min()} to {y.max()}")
