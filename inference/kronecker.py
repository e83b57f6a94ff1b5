r"""Kronecker factors of the GGN or Fisher of each layer, their eigenbases, and the prior added there.

.. math:: H_l \approx \frac{1}{R} \Big(\sum_{n,t} \sum_c g_{nct} g_{nct}^\top\Big) \otimes
          \Big(\sum_{n,t} a_{nt} a_{nt}^\top\Big)

with inputs a (a one appended for the bias), output gradients g of the columns c of a root of the declared likelihood's
Fisher information, and R the number of terms (n, t): data times places where the weight is used ("expand"; Martens &
Grosse 2015, Grosse & Martens 2016). "reduce" takes the mean of a and the sum of g over the places first, and R = N
(Eschenhagen et al. 2023). Both sums run over all data before anything is multiplied, so minibatches add up exactly.

In the eigenbasis of both factors the precision is diagonal, and a prior precision :math:`\delta_{ij} = r_i c_j` is
added exactly: divide the factors by :math:`\sqrt{r}` and :math:`\sqrt{c}` on both sides, and it becomes the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inference import data
from inference.jacobians import CHUNK_BYTES, Advance, chunk_size, entries_jacobian
from inference.kronecker_gaussian import KroneckerBlock
from inference.layer_blocks import LayerBlock
from inference.observation import LikelihoodFamily
from inference.tape import Pass
from inference.taps import Slope, Taps, floats_per_datum, passes
from inference.target import Target

Sharing = Literal["expand", "reduce"]
# Entries of a site outside the layers up to which its block is kept dense.
_DENSE_ENTRIES = 64
# Columns of a factor that are multiplied with those before them at a time.
_SQUARE = 128
# A prior precision is taken as a product of row and column factors up to this relative error.
_PRODUCT_TOLERANCE = 1e-6
# Precision that stands in for a flat prior beside curved ones, relative to their mean.
_FLAT = 1e-8


@dataclass(eq=False)
class Factors:
    """Sums over the data for one layer, in float64.

    Attributes:
        name: Site of the layer's weight.
        positions: Index into theta, (out, in).
        outputs: Sum of g g^T, (out, out).
        inputs: Sum of a a^T, (in, in); of an embedding, how often each token occurs, (in,).
        terms: Number R of terms in each sum.
    """

    name: str
    positions: Tensor
    outputs: Tensor
    inputs: Tensor
    terms: int = 0

    def dense(self) -> Tensor:
        """The curvature they stand for, in the order of ``positions.flatten()``: for small layers and tests."""
        inputs = self.inputs.diag() if self.inputs.dim() == 1 else self.inputs
        return torch.kron(self.outputs, inputs) / self.terms


@dataclass(eq=False)
class KroneckerCurvature:
    """Curvature of the likelihood, one block per layer and site, in float64 and not tempered.

    Attributes:
        layers: Kronecker factors of the layers.
        sites: Of small sites outside the layers, the entries (R,) and their dense curvature (R, R).
        entries: Remaining entries of theta, (R,).
        diagonal: The exact diagonal there, (R,).
        num_data: Number of data N.
    """

    layers: list[Factors]
    sites: list[tuple[Tensor, Tensor]]
    entries: Tensor
    diagonal: Tensor
    num_data: int


def kronecker_curvature(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    y: Tensor | None = None,
    labels: bool = False,
    sharing: Sharing = "expand",
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
    slope: Slope | None = None,
) -> KroneckerCurvature:
    """Accumulate the factors over the data.

    Args:
        target: The compiled model.
        theta: Where to linearise, (P,).
        x: Inputs, (N, ...); the training data when None.
        y: Targets, (N, ...), read only with ``labels``; the training targets when None.
        labels: Use the gradients of the log likelihood at ``y`` (the empirical Fisher, or a Monte Carlo one where y was
            drawn from the model) instead of the exact Fisher.
        sharing: What to do with weights used at several places, "expand" or "reduce"; embeddings always expand.
        chunk_bytes: Bound on what is held at once.
        advance: Called with the number of data of each finished chunk.
        slope: Collects the log likelihood of the training data and its gradient from the same passes.

    Returns:
        The curvature.
    """
    x, y = target.x if x is None else x, target.y if y is None else y
    found: list[Factors] = []
    rest = _Rest(target, theta)
    size = chunk_size(floats_per_datum(target, 2), theta, chunk_bytes)
    for rows, taps, done in passes(target, theta, x, size, slope):
        found = found or [_empty(block, theta) for block in taps.blocks]
        part = data.index(x, rows)
        if labels:
            columns = score(taps.family, done.eta, done.params, y[rows]).unsqueeze(-1)
        else:
            columns = target.fisher_family(taps.family, part).fisher_root(done.params)
        _add(found, taps, done, columns, sharing)
        rest.add(taps, part, columns, chunk_bytes)
        if advance is not None:
            advance(rows.stop - rows.start)
    for factors in found:
        for matrix in (factors.outputs, factors.inputs):
            if matrix.dim() == 2:
                matrix.copy_(matrix.tril() + matrix.tril(-1).mT)
    return KroneckerCurvature(found, rest.sites, rest.entries, rest.diagonal, data.num_data(x))


def score(family: LikelihoodFamily, eta: Tensor, params: dict[str, Tensor], y: Tensor) -> Tensor:
    """Gradient of each datum's log likelihood with respect to its eta.

    Args:
        family: The likelihood.
        eta: (n, E).
        params: Parameters at the same inputs, each (n, ...).
        y: Targets, (n, ...).

    Returns:
        (n, E).
    """
    point = eta.detach().requires_grad_()
    with torch.enable_grad():
        fixed = {name: value.detach() for name, value in params.items()}
        total = family.distribution(family.from_eta(point, fixed)).log_prob(y).sum()
    return torch.autograd.grad(total, point)[0]


def layer_block(
    factors: Factors,
    prior: Tensor,
    num_data: int,
    *,
    likelihood_temperature: float = 1.0,
    temperature: float = 1.0,
    damping: bool = False,
) -> tuple[KroneckerBlock, float]:
    """Posterior covariance of one layer.

    Args:
        factors: Its curvature.
        prior: Prior precisions, (out, in), none negative.
        num_data: Number of data N, for ``damping``.
        likelihood_temperature: T of the likelihood.
        temperature: T of everything.
        damping: Add square roots of the prior precision to both factors (Ritter et al. 2018), which counts cross terms
            that are not there, instead of adding it to their product.

    Returns:
        The block, in float64, and the largest relative error of the prior precision that was added.

    Raises:
        ValueError: If the precision is not positive.
    """
    out_root, in_root, error = factored_prior(prior)
    flat = not bool((prior > 0).any())
    outputs = factors.outputs / (out_root[:, None] * out_root) / (factors.terms * likelihood_temperature)
    out_values, out_vectors = torch.linalg.eigh(outputs)
    if factors.inputs.dim() == 1:
        in_values, in_vectors = factors.inputs / in_root.square(), None
    else:
        in_values, in_vectors = torch.linalg.eigh(factors.inputs / (in_root[:, None] * in_root))
    out_values, in_values = out_values.clamp(min=0), in_values.clamp(min=0)
    if damping and not flat:
        root = math.sqrt(num_data)
        precision = torch.outer(out_values * root + 1, in_values / root + 1)
    else:
        precision = torch.outer(out_values, in_values) + (0.0 if flat else 1.0)
    require_curved(precision, factors.name)
    block = KroneckerBlock(
        factors.positions, temperature / precision, out_vectors, in_vectors, 1 / out_root, 1 / in_root
    )
    return block, error


def require_curved(precision: Tensor, site: str) -> None:
    """Refuse a precision that is not positive.

    Args:
        precision: Eigenvalues or entries of H + A.
        site: Where they belong, for the message.

    Raises:
        ValueError: If one is not > 0.
    """
    if not bool((precision > 0).all()):
        raise ValueError(
            f"the posterior precision H + A must be positive, got {precision.min().item():.3g} in site {site!r}: "
            "neither data nor prior bend the density there; give that site a prior with curvature (such as Normal), "
            "or leave it out with Subset"
        )


def factored_prior(prior: Tensor) -> tuple[Tensor, Tensor, float]:
    """Write a prior precision as a product of row and column factors, the nearest there is in relative terms.

    Args:
        prior: Precisions, (out, in), none negative.

    Returns:
        Roots of the factors, (out,) and (in,), and the largest relative error.
    """
    if not bool((prior > 0).any()):
        return torch.ones_like(prior[:, 0]), torch.ones_like(prior[0]), 0.0
    floor = _FLAT * prior[prior > 0].mean()
    logs = prior.clamp(min=float(floor)).log()
    rows, columns = logs.mean(1) - logs.mean() / 2, logs.mean(0) - logs.mean() / 2
    error = float((rows[:, None] + columns - logs).abs().max())
    if bool((prior <= 0).any()):
        error = float("inf")
    return (rows / 2).exp(), (columns / 2).exp(), 0.0 if error < _PRODUCT_TOLERANCE else math.expm1(min(error, 50.0))


def _empty(block: LayerBlock, theta: Tensor) -> Factors:
    out, columns = block.positions.shape
    like = {"dtype": torch.float64, "device": theta.device}
    inputs = torch.zeros(columns, **like) if block.kind == "embedding" else torch.zeros(columns, columns, **like)
    return Factors(block.name, block.positions, torch.zeros(out, out, **like), inputs)


def _add(found: list[Factors], taps: Taps, done: Pass, columns: Tensor, sharing: Sharing) -> None:
    """Add one chunk to the factors of all layers."""
    for factors, block in zip(found, taps.blocks, strict=True):
        inputs = done.inputs(block)
        if block.kind == "embedding":
            factors.inputs += torch.bincount(inputs.flatten(), minlength=len(factors.inputs))
            factors.terms += inputs.numel()
            continue
        rows = inputs.mean(1, keepdim=True) if sharing == "reduce" else inputs
        _add_squares(factors.inputs, rows)
        factors.terms += rows.shape[0] * rows.shape[1]
    for column in columns.unbind(-1) if taps.blocks else ():
        for factors, gradients in zip(found, done.gradients(column), strict=True):
            reduced = sharing == "reduce" and factors.inputs.dim() > 1
            _add_squares(factors.outputs, gradients.sum(1, keepdim=True) if reduced else gradients)


def _add_squares(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle, in blocks, of the sum of r r^T over rows (n, T, d)."""
    columns = rows.permute(2, 0, 1).flatten(1)  # as a convolution's lie in memory, its places innermost
    for start in range(0, len(columns), _SQUARE):
        stop = start + _SQUARE
        total[start:stop, :stop] += columns[start:stop] @ columns[:stop].mT


class _Rest:
    """Curvature outside the layers: dense for small sites, the diagonal elsewhere.

    Args:
        target: The model.
        theta: Where to linearise.
    """

    def __init__(self, target: Target, theta: Tensor) -> None:
        self.target, self.theta = target, theta
        self.sites: list[tuple[Tensor, Tensor]] = []
        self.entries = torch.zeros(0, dtype=torch.long, device=theta.device)
        self.diagonal = torch.zeros(0, dtype=torch.float64, device=theta.device)
        self._all: Tensor | None = None

    def add(self, taps: Taps, x: Any, columns: Tensor, chunk_bytes: int) -> None:
        """Add one chunk.

        Args:
            taps: Where the layers are.
            x: Inputs of the chunk.
            columns: Root of each datum's Fisher information, (n, E, C).
            chunk_bytes: Bound on the Jacobians held at once.
        """
        if self._all is None:
            self._lay_out(taps.rest)
        assert self._all is not None
        if not len(self._all):
            return
        size = chunk_size(4 * columns.shape[1] * len(self._all), self.theta, chunk_bytes)
        for piece in data.chunks(len(columns), size):
            jacobian = entries_jacobian(self.target, self.theta, data.index(x, piece), self._all).double()
            rows = (columns[piece].mT.double() @ jacobian).flatten(0, 1)
            start = 0
            for entries, matrix in self.sites:
                own = rows[:, start : start + len(entries)]
                matrix += own.mT @ own
                start += len(entries)
            self.diagonal += rows[:, start:].square().sum(0)

    def _lay_out(self, rest: Tensor) -> None:
        large = []
        for site in self.target.sites:
            entries = rest[(rest >= site.start) & (rest < site.stop)]
            if len(entries) > _DENSE_ENTRIES:
                large.append(entries)
            elif len(entries):
                empty = torch.zeros(len(entries), len(entries), dtype=torch.float64, device=rest.device)
                self.sites.append((entries, empty))
        self.entries = torch.cat(large) if large else self.entries
        self.diagonal = torch.zeros(len(self.entries), dtype=torch.float64, device=rest.device)
        self._all = torch.cat([*(entries for entries, _ in self.sites), self.entries])
