r"""The declared likelihood taken apart, so that any backend can use it without knowing the model.

The distribution of the observed site is split into its class and its parameter tensors. ``eta`` are those parameters
in unconstrained space, the coordinates in which networks are linearised and in which the Fisher information
:math:`F(\eta) = -E_y[\nabla^2_\eta \log p(y \mid \eta)]` of one datum is known in closed form:

==================  =========================  =================================================
likelihood          eta                        Fisher information (nats)
==================  =========================  =================================================
Normal              loc, log scale             1/s^2, 2
StudentT            loc, log scale             (v+1)/((v+3) s^2), 2v/(v+3)
Categorical         logits                     diag(p) - p p^T
Bernoulli           logits                     p (1-p)
Poisson             log rate                   rate
==================  =========================  =================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from inference.errors import UnsupportedModelError

# Parameters that determine a distribution which stores several redundant ones.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "Categorical": ("logits",),
    "OneHotCategorical": ("logits",),
    "Bernoulli": ("logits",),
    "Geometric": ("logits",),
    "Binomial": ("total_count", "logits"),
    "NegativeBinomial": ("total_count", "logits"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "LowRankMultivariateNormal": ("loc", "cov_factor", "cov_diag"),
}
_KINDS = {
    "Normal": "normal",
    "StudentT": "student_t",
    "Categorical": "categorical",
    "Bernoulli": "bernoulli",
    "Poisson": "poisson",
}
# Parameters in eta, with the constraint that takes them there.
_ETA: dict[str, tuple[str, ...]] = {
    "normal": ("loc", "scale"),
    "student_t": ("loc", "scale"),
    "categorical": ("logits",),
    "bernoulli": ("logits",),
    "poisson": ("rate",),
}


def unwrap(fn: Any) -> tuple[Any, int]:
    """Strip the wrappers Pyro puts around a distribution.

    Args:
        fn: Distribution of a site.

    Returns:
        The distribution inside and the number of its batch dimensions that the wrappers declare as event dimensions.
    """
    event = 0
    while True:
        if isinstance(fn, torch.distributions.Independent):
            event += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        elif type(fn).__name__ in ("ExpandedDistribution", "MaskedDistribution"):
            fn = fn.base_dist
        else:
            return fn, event


def parameter_tensors(fn: Any) -> dict[str, Tensor]:
    """Parameters of a distribution, broadcast to its batch shape; Python numbers become tensors.

    Args:
        fn: Distribution of the observed site.

    Returns:
        Tensors by parameter name, each of shape batch_shape + its own event shape.

    Raises:
        UnsupportedModelError: If the distribution cannot be rebuilt from named tensors.
    """
    base, _ = unwrap(fn)
    names = _PARAMETERS.get(type(base).__name__, tuple(base.arg_constraints))
    if not names or isinstance(base, torch.distributions.MixtureSameFamily) or type(base).__name__ == "Delta":
        raise UnsupportedModelError(
            f"the observed site's distribution {type(base).__name__} cannot be rebuilt from named parameters; "
            "predictions "
            "need a distribution with `arg_constraints`, such as Normal, StudentT, Categorical, Bernoulli or Poisson"
        )
    batch = fn.batch_shape + fn.event_shape[: fn.event_dim - len(base.event_shape)]
    found = {}
    for name in names:
        value = getattr(base, name)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(float(value))
        own = value.shape[len(base.batch_shape) :] if value.dim() >= len(base.batch_shape) else ()
        found[name] = value.expand(batch + own) if value.dim() else value.expand(batch)
    return found


@dataclass(frozen=True)
class LikelihoodFamily:
    """Class of the observed distribution: everything but the parameter values.

    Attributes:
        cls: Pyro distribution class.
        names: Parameter names, in the order of the class's constructor.
        event: Trailing batch dimensions of ``cls`` that belong to one datum's event.
        data_shape: Shape of one datum's target (empty for scalars and class labels).
        varying: Names of the parameters that depend on theta (set by the target).
    """

    cls: type
    names: tuple[str, ...]
    event: int
    data_shape: tuple[int, ...]
    varying: frozenset[str]

    @property
    def kind(self) -> str:
        """Short name: normal, student_t, categorical, bernoulli, poisson or other."""
        return _KINDS.get(self.cls.__name__, "other")

    @property
    def is_classification(self) -> bool:
        """Whether targets are class labels."""
        return self.kind in ("categorical", "bernoulli")

    def distribution(self, params: dict[str, Tensor]) -> Any:
        """Rebuild the observed distribution.

        Args:
            params: Tensors by name, each (..., B, *data shape [, K]); any leading dimensions.

        Returns:
            Pyro distribution with batch shape (..., B).
        """
        base = self.cls(**params, validate_args=False)
        return base.to_event(self.event) if self.event else base

    @property
    def eta_names(self) -> tuple[str, ...]:
        """Names of the parameters that make up eta: those of the family's Fisher that depend on theta.

        Raises:
            UnsupportedModelError: If this family has no closed form here.
        """
        if self.kind == "other" or "df" in self.varying:
            detail = "a latent df" if "df" in self.varying else self.cls.__name__
            raise UnsupportedModelError(
                "linearisation and Fisher information know Normal, StudentT (fixed df), Categorical, Bernoulli "
                "and Poisson "
                f"likelihoods, not {detail}; use a sampling backend such as NUTS, or MeanFieldVI"
            )
        return tuple(name for name in _ETA[self.kind] if name in self.varying)

    def to_eta(self, params: dict[str, Tensor]) -> Tensor:
        """Flatten the varying parameters to unconstrained coordinates.

        Args:
            params: Tensors by name, each (B, ...).

        Returns:
            Tensor (B, E).
        """
        parts = []
        for name in self.eta_names:
            value = params[name].log() if name in ("scale", "rate") else params[name]
            parts.append(value.reshape(value.shape[0], -1))
        return torch.cat(parts, -1)

    def from_eta(self, eta: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo :meth:`to_eta`.

        Args:
            eta: (..., B, E).
            params: Parameters of the same inputs, each (B, ...): shapes, and values of what does not vary.

        Returns:
            Tensors by name, each (..., B, ...).
        """
        lead = eta.shape[:-2]
        out, start = {}, 0
        for name in self.names:
            value = params[name]
            if name not in self.eta_names:
                out[name] = value.expand(lead + value.shape)
                continue
            size = math.prod(value.shape[1:])
            piece = eta[..., start : start + size].reshape(lead + value.shape)
            out[name] = piece.exp() if name in ("scale", "rate") else piece
            start += size
        return out

    def fisher(self, params: dict[str, Tensor]) -> Tensor:
        """Fisher information of each datum with respect to eta.

        Args:
            params: Tensors by name, each (B, ...).

        Returns:
            (B, E, E) in nats.
        """
        if self.kind == "categorical":
            probs = params["logits"].softmax(-1)  # (B, ..., K)
            blocks = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
            return _block_diagonal(blocks)
        return torch.diag_embed(self._fisher_diagonal(params))

    def fisher_root(self, params: dict[str, Tensor]) -> Tensor:
        r"""Square roots :math:`F = R R^\top` of :meth:`fisher`, in closed form.

        Args:
            params: Tensors by name, each (B, ...).

        Returns:
            (B, E, C), with C = E, or K - 1 for each label of K classes: one direction of its logits tells nothing.
        """
        if self.kind == "categorical":
            return _block_diagonal(_categorical_root(params["logits"].softmax(-1)))
        return torch.diag_embed(self._fisher_diagonal(params).sqrt())

    def _fisher_diagonal(self, params: dict[str, Tensor]) -> Tensor:
        diagonals = []
        for name in self.eta_names:
            value = params[name]
            diagonals.append(_FISHER[self.kind, name](params).expand(value.shape).reshape(value.shape[0], -1))
        return torch.cat(diagonals, -1)


def _categorical_root(probs: Tensor) -> Tensor:
    r"""Cholesky factor of diag(p) - p p^T, (..., K) to (..., K, K - 1).

    With :math:`s_k = \sum_{l \ge k} p_l` its diagonal is :math:`\sqrt{p_k s_{k+1} / s_k}` and below it stands minus
    that times :math:`p_j / s_{k+1}`: no differences, so that nothing cancels where a class is certain.

    Args:
        probs: p, (..., K).

    Returns:
        (..., K, K - 1).
    """
    left = probs.flip(-1).cumsum(-1).flip(-1).clamp(min=torch.finfo(probs.dtype).tiny)
    after = left[..., 1:]
    pivots = (probs[..., :-1] * after / left[..., :-1]).sqrt().unsqueeze(-2)
    size = probs.shape[-1]
    unit = torch.eye(size, size - 1, dtype=probs.dtype, device=probs.device)
    return (unit - (probs.unsqueeze(-1) / after.unsqueeze(-2)).tril(-1)) * pivots


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(B, ..., K, C) to (B, M K, M C) with the M middle places on the diagonal."""
    num = blocks.shape[0]
    blocks = blocks.reshape(num, -1, *blocks.shape[-2:])
    if blocks.shape[1] == 1:
        return blocks[:, 0]
    return torch.stack([torch.block_diag(*b) for b in blocks])


def _bernoulli_fisher(params: dict[str, Tensor]) -> Tensor:
    probs = params["logits"].sigmoid()
    return probs * (1 - probs)


_FISHER: dict[tuple[str, str], Callable[[dict[str, Tensor]], Tensor]] = {
    ("normal", "loc"): lambda p: p["scale"].pow(-2),
    ("normal", "scale"): lambda p: torch.full_like(p["scale"], 2.0),
    ("student_t", "loc"): lambda p: (p["df"] + 1) / ((p["df"] + 3) * p["scale"].square()),
    ("student_t", "scale"): lambda p: 2 * p["df"] / (p["df"] + 3),
    ("bernoulli", "logits"): _bernoulli_fisher,
    ("poisson", "rate"): lambda p: p["rate"],
}


def family_of(fn: Any, varying: frozenset[str]) -> LikelihoodFamily:
    """Describe the distribution of the observed site.

    Args:
        fn: Distribution with batch shape (B,) and one datum's target as event.
        varying: Parameters that depend on theta.

    Returns:
        The family.
    """
    base, _ = unwrap(fn)
    event = fn.event_dim - len(base.event_shape)
    return LikelihoodFamily(
        cls=getattr(dist, type(base).__name__, type(base)),
        names=tuple(parameter_tensors(fn)),
        event=event,
        data_shape=tuple(fn.event_shape),
        varying=varying,
    )


def is_discrete(support: Any) -> bool:
    """Whether a support has no density to move through."""
    return bool(getattr(support, "is_discrete", False))


class LowerCholeskyBijection(torch.distributions.Transform):
    """Vectors of length d (d + 1) / 2, rows of the lower triangle, to Cholesky factors: the diagonal is exponentiated.

    Torch's own transform reads d x d matrices and ignores their upper half, so it is no bijection.
    """

    domain = constraints.independent(constraints.real, 1)
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerCholeskyBijection)

    __hash__ = None  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        size = self.inverse_shape_of_triangle(x.shape[-1])
        rows, columns = torch.tril_indices(size, size)
        place = torch.zeros(size, size, dtype=torch.long)
        place[rows, columns] = torch.arange(x.shape[-1])
        full = x[..., place.to(x.device)]
        return full.tril(-1) + torch.diag_embed(full.diagonal(dim1=-2, dim2=-1).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        full = y.tril(-1) + torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).log())
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1])
        return full[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the logarithms of the diagonal: (..., d (d + 1) / 2) and (..., d, d) to (...)."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the factors."""
        size = self.inverse_shape_of_triangle(shape[-1])
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the vectors."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    @staticmethod
    def inverse_shape_of_triangle(length: int) -> int:
        """Rows d of a triangle with d (d + 1) / 2 entries."""
        return (math.isqrt(8 * length + 1) - 1) // 2


def bijection(support: Any) -> Any:
    """The map from unconstrained space onto a support: torch's and Pyro's own choice where they have one."""
    if support is constraints.lower_cholesky:
        return LowerCholeskyBijection()
    if isinstance(support, constraints.independent):
        inner = bijection(support.base_constraint)
        return torch.distributions.transforms.IndependentTransform(inner, support.reinterpreted_batch_ndims)
    return biject_to(support)
