r"""Class probabilities of a Gaussian over logits in closed form, in place of an average over draws.

Softmax does not see what is added to all K logits, and a declared Categorical keeps them normalised. Both links work on
logits of sum 0, :math:`\mu = C f` and :math:`V = C\,\mathrm{Cov}(f)\,C` with :math:`C = I - 1 1^\top / K`:

* probit (MacKay 1992), for two classes with mean m and variance v of the logits' *difference*
  :math:`p_1 = \sigma(m / \sqrt{1 + \pi v / 8})`, and for more
  :math:`p = \mathrm{softmax}(\mu_k / \sqrt{1 + \pi v_k / 8})` with :math:`v_k = V_{kk} K / (K - 1)`, the variance of a
  logit where all are independent and alike [our choice of the common shift; published for logits as they come];
* Laplace bridge (Hobbhahn et al. 2022):

  .. math:: \alpha_k = \frac{1}{V_{kk}} \Big(1 - \frac{2}{K} + \frac{e^{\mu_k}}{K^2} \sum_l e^{-\mu_l}\Big),
            \qquad p \sim \mathrm{Dirichlet}(\alpha);

* its normalised form, the mean of that Dirichlet for :math:`\mu / \sqrt{c}` and :math:`V / c` with
  :math:`c = \frac1K \sum_k V_{kk} \big/ \sqrt{K/2}`, read in laplace-torch (its "bridge_norm").

Probit is the more accurate: off by at most 0.015 for two classes; with more it ignores covariances of logits (off by
0.003 to 0.07 on average over random Gaussians of 3 and 10 logits). The bridge is a Dirichlet, so entropies and
variances come with it, but its mean is not softmax(mu) as V goes to 0 with three and more classes, and for two classes
it is sigmoid(m) *whatever* v. Normalised it softens the mean where outputs are wide (c > 1), and makes it surer than
the network alone where they are narrow, without bound as V goes to 0; its Dirichlet no longer knows how large V was, so
its mean alone is offered. References: MacKay (1992); Hobbhahn et al. (2022) [recalled, not re-read].
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from inference.data import Tree, num_data
from inference.distributions import FlatGaussian
from inference.errors import CapabilityError
from inference.linearised import LinearisedSource
from inference.mixtures import Moments, Params
from inference.observation import LikelihoodFamily
from inference.prediction import Prediction
from inference.target import Target

Link = Literal["monte_carlo", "probit", "laplace_bridge", "laplace_bridge_norm"]
LINKS: tuple[str, ...] = get_args(Link)
_LARGEST_LOG = 60.0


def check_link(link: str) -> None:
    """Raise unless this is the name of a link.

    Args:
        link: Name.

    Raises:
        ValueError: If it is none of ``LINKS``.
    """
    if link not in LINKS:
        names = ", ".join(f'"{name}"' for name in LINKS)
        raise ValueError(f"`link` must be one of {names}, got {link!r}")


def refuse_link(link: str, backend: str, kind: str) -> None:
    """Raise unless the link is Monte Carlo, which every posterior has.

    Args:
        link: Name.
        backend: Name of the backend, for the message.
        kind: What its posterior is, for the message.

    Raises:
        CapabilityError: Naming the backends that have the others.
    """
    check_link(link)
    if link != "monte_carlo":
        raise CapabilityError(
            f'link="{link}" is for a network linearised at a mode, but {backend} gives {kind} and averages over draws '
            'of the network; leave `link` at "monte_carlo", or fit DenseLaplace, DiagonalLaplace, KroneckerLaplace, '
            'LowRankLaplace or FunctionalLaplace with predictive="linearized"'
        )


def probit_logits(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits whose softmax is the probit approximation of E[softmax(f)]; of two, through their difference.

    Args:
        mean: Mean of the logits, (..., K).
        covariance: Their covariance, (..., K, K).

    Returns:
        (..., K); the arguments are left as they are.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if mean.shape[-1] != 2:
        return mean * _probit_factor(variance)
    difference = mean[..., 1] - mean[..., 0]
    spread = variance.sum(-1) - covariance[..., 0, 1] - covariance[..., 1, 0]
    half = 0.5 * difference * _probit_factor(spread)
    return torch.stack([-half, half], -1)


def centred(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian logits less their mean over the classes, which softmax does not see.

    Args:
        mean: Mean of the logits, (..., K).
        covariance: Their covariance, (..., K, K).

    Returns:
        Mean, (..., K), and covariance, (..., K, K), of logits whose sum is 0; the arguments are left as they are.
    """
    rows = covariance - covariance.mean(-1, keepdim=True)
    return mean - mean.mean(-1, keepdim=True), rows - rows.mean(-2, keepdim=True)


def bridge_log_concentration(mean: Tensor, variance: Tensor) -> Tensor:
    """Logarithms of the concentrations of the Laplace bridge's Dirichlet.

    Args:
        mean: Mean of logits whose sum is 0, (..., K).
        variance: Their variances, (..., K).

    Returns:
        log alpha, (..., K), finite also where a variance is 0.
    """
    num = mean.shape[-1]
    spread = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(num)
    if num > 2:
        spread = torch.logaddexp(spread, spread.new_tensor(math.log1p(-2 / num)))
    return spread - variance.clamp(min=torch.finfo(mean.dtype).eps ** 2).log()


def normalised(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in the unit of their width, for the normalised Laplace bridge.

    Args:
        mean: Mean of logits whose sum is 0, (..., K).
        variance: Their variances, (..., K).

    Returns:
        Mean and variances, (..., K), of logits whose average variance is sqrt(K / 2); finite also where it was 0.
    """
    width = (variance.mean(-1, keepdim=True) * (2 / mean.shape[-1]) ** 0.5).clamp(min=torch.finfo(mean.dtype).eps ** 2)
    return mean * width.rsqrt(), variance / width


class LinkedSource(LinearisedSource):
    """One component whose class probabilities are those of a link.

    Args:
        target: The model.
        gaussian: Gaussian over theta; its mean is the linearisation point.
        x: Inputs, every leaf (N, ...).
        link: "probit", "laplace_bridge" or "laplace_bridge_norm".
    """

    def __init__(self, target: Target, gaussian: FlatGaussian, x: Tree, link: str) -> None:
        super().__init__(target, gaussian, x, num_samples=1, seed=0)
        self.link = link

    def params(self, rows: slice) -> Params:
        """The one component's logits at some inputs, (1, n, ...)."""
        eta, covariance, base = self._linearise(rows)
        mean, spread = _class_logits(self.family, eta, covariance, base)
        num = mean.shape[-1]
        if self.link == "probit":
            logits = probit_logits(mean, spread if num == 2 else spread * (num / (num - 1)))
        else:
            variance = spread.diagonal(dim1=-2, dim2=-1)
            if self.link == "laplace_bridge_norm":
                mean, variance = normalised(mean, variance)
            logits = bridge_log_concentration(mean, variance)
        if self.family.kind == "bernoulli":
            logits = logits[..., 1] - logits[..., 0]
        else:
            logits = logits.log_softmax(-1)
        return {"logits": logits.reshape(1, *base["logits"].shape)}

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments of y, split by the Dirichlet's variance where there is one; those of f are exact."""
        found = super().moments(rows, params)
        if self.link != "laplace_bridge":
            return found
        shape = found.mean.shape if self.family.kind == "bernoulli" else (*found.mean.shape[:-1], 1)
        share = (1 / (1 + self._concentration(rows).sum(-1))).reshape(shape)
        total = found.mean * (1 - found.mean)
        return Moments(found.mean, total * (1 - share), total * share, found.f_mean, found.f_variance)

    def expected_entropy(self, rows: slice) -> Tensor:
        """E[H(p)] of the Dirichlet at some inputs, (n, ...) nats."""
        alpha = self._concentration(rows)
        total = alpha.sum(-1, keepdim=True)
        inside = torch.digamma(total + 1) - torch.digamma(alpha + 1)
        entropy = (alpha / total * inside).sum(-1)
        logits = self._linearise(rows)[2]["logits"]
        shape = logits.shape if self.family.kind == "bernoulli" else logits.shape[:-1]
        return entropy.reshape(shape)

    def _concentration(self, rows: slice) -> Tensor:
        """Concentrations, (n, M, K) for M labels per datum; finite however small a variance."""
        mean, spread = _class_logits(self.family, *self._linearise(rows))
        return bridge_log_concentration(mean, spread.diagonal(dim1=-2, dim2=-1)).clamp(max=_LARGEST_LOG).exp()


class LinkedPrediction(Prediction):
    """Predictive class probabilities of a link; what needs draws of the probabilities is there with the bridge alone.

    Args:
        target: The model.
        gaussian: Gaussian over theta; its mean is the linearisation point.
        x: Inputs, every leaf (N, ...).
        link: "probit", "laplace_bridge" or "laplace_bridge_norm".
        seed: Seed of :meth:`sample`.

    Raises:
        CapabilityError: If targets are not class labels.
    """

    def __init__(self, target: Target, gaussian: FlatGaussian, x: Tree, link: str, seed: int = 0) -> None:
        family = target.family()
        if not family.is_classification:
            raise CapabilityError(
                f'link="{link}" gives class probabilities (Categorical or Bernoulli), but y is '
                f'{family.cls.__name__}; leave `link` at "monte_carlo"'
            )
        self.link = link
        self._linked = LinkedSource(target, gaussian, x, link)
        super().__init__(self._linked, num_data(x), seed)

    @property
    def aleatoric_variance(self) -> Tensor:
        """Expected variance of y given p, (N, ...)."""
        self._need_distribution("aleatoric_variance")
        return super().aleatoric_variance

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance of p, (N, ...)."""
        self._need_distribution("epistemic_variance")
        return super().epistemic_variance

    @property
    def variance(self) -> Tensor:
        """Variance of y, of its one-hot form for several classes, (N, ...)."""
        return self.mean * (1 - self.mean)

    @property
    def aleatoric_entropy(self) -> Tensor:
        """Expected entropy E H[p], (N,) nats."""
        self._need_distribution("aleatoric_entropy")
        return super().aleatoric_entropy

    def _entropies(self, rows: slice, params: Params) -> tuple[Tensor, Tensor]:
        probs, entropy = super()._entropies(rows, params)
        return probs, self._linked.expected_entropy(rows) if self.link == "laplace_bridge" else entropy

    def _need_distribution(self, name: str) -> None:
        if self.link != "laplace_bridge":
            raise CapabilityError(
                f'`{name}` needs a distribution over class probabilities, and link="{self.link}" gives their mean '
                'alone; use link="laplace_bridge" or "monte_carlo"'
            )


def _probit_factor(variance: Tensor) -> Tensor:
    return (1 + math.pi / 8 * variance.clamp(min=0)).rsqrt()


def _class_logits(family: LikelihoodFamily, eta: Tensor, covariance: Tensor, base: Params) -> tuple[Tensor, Tensor]:
    """Centred logits of M labels per datum with K classes each, (n, M, K), and their covariances, (n, M, K, K)."""
    if family.kind == "categorical":
        num = base["logits"].shape[-1]
        mean = eta.reshape(eta.shape[0], -1, num)
        blocks = covariance.reshape(eta.shape[0], mean.shape[1], num, mean.shape[1], num)
        return centred(mean, blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    # One logit as two of opposite sign: half of it each.
    sign = eta.new_tensor([-0.5, 0.5])
    return eta.unsqueeze(-1) * sign, variance[..., None, None] * torch.outer(sign, sign)
