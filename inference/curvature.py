r"""Curvature of a target: generalised Gauss-Newton, Hessian, Fisher, and what linearised prediction needs of it.

With :math:`\eta_n(\theta)` the likelihood's unconstrained parameters for datum n (E of them),
:math:`J_n = \partial \eta_n / \partial \theta` and :math:`F_n` the Fisher information of one datum in them,

.. math:: H_{GGN} = \sum_n J_n^\top F_n J_n .

All curvatures here are of the *negative log likelihood summed over the data*, in nats and not tempered; the prior's
comes from `prior_precision`. They are accumulated and returned in float64 whatever the model's dtype: a GGN summed in
float32 plus a weak prior is often no longer positive definite. Jacobians exist for one chunk of data at a time, sized
in bytes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from inference import data
from inference.distributions import FlatGaussian
from inference.graph import capture
from inference.target import Target

CHUNK_BYTES = 32 * 2**20
"""Default bound on the Jacobians held at once."""

Advance = Callable[[int], object]


def ggn(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> Tensor:
    r"""Generalised Gauss-Newton matrix :math:`\sum_n J_n^\top F_n J_n`, the Hessian of the linearised model.

    Positive semi-definite; equal to the exact Hessian where eta is linear in theta and its Hessian free of y.

    Args:
        target: The compiled model; its likelihood family supplies F_n in closed form.
        theta: Where to linearise, shape (P,).
        x: Inputs, (B, ...); the training inputs when None.
        chunk_bytes: Bound on the Jacobians held at once.
        advance: Called with the number of data of each finished chunk, for progress bars.

    Returns:
        Symmetric matrix, shape (P, P), float64.
    """
    total = theta.new_zeros(target.dim, target.dim, dtype=torch.float64)
    for fisher, jacobian in _fisher_and_jacobian(target, theta, x, chunk_bytes, advance):
        jacobian = jacobian.double()
        total.addmm_((fisher.double() @ jacobian).flatten(0, 1).mT, jacobian.flatten(0, 1))
    return _symmetric(total)


def ggn_diagonal(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> Tensor:
    """Diagonal of `ggn`, without forming the matrix.

    Args:
        target: The compiled model.
        theta: Where to linearise, shape (P,).
        x: Inputs, (B, ...); the training inputs when None.
        chunk_bytes: Bound on the Jacobians held at once.
        advance: Called with the number of data of each finished chunk.

    Returns:
        Non-negative vector, shape (P,), float64.
    """
    total = theta.new_zeros(target.dim, dtype=torch.float64)
    for fisher, jacobian in _fisher_and_jacobian(target, theta, x, chunk_bytes, advance):
        total += ((fisher @ jacobian) * jacobian).sum((0, 1), dtype=torch.float64)
    return total


def empirical_fisher(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    y: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> Tensor:
    r"""Empirical Fisher :math:`\sum_n g_n g_n^\top` with :math:`g_n = \nabla_\theta \log p(y_n \mid x_n, \theta)`.

    It uses the labels that were seen, so it vanishes where the data are interpolated: variances from it then blow up.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).
        x: Inputs, (B, ...); the training data when None.
        y: Targets, (B, ...); given together with x.
        chunk_bytes: Bound on the gradients held at once.
        advance: Called with the number of data of each finished chunk.

    Returns:
        Symmetric matrix, shape (P, P), float64.
    """
    total = theta.new_zeros(target.dim, target.dim, dtype=torch.float64)
    for grads in _datum_gradients(target, theta, x, y, chunk_bytes, advance):
        grads = grads.double()
        total.addmm_(grads.mT, grads)
    return _symmetric(total)


def empirical_fisher_diagonal(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    y: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> Tensor:
    """Diagonal of `empirical_fisher`, without forming the matrix.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).
        x: Inputs, (B, ...); the training data when None.
        y: Targets, (B, ...); given together with x.
        chunk_bytes: Bound on the gradients held at once.
        advance: Called with the number of data of each finished chunk.

    Returns:
        Non-negative vector, shape (P,), float64.
    """
    total = theta.new_zeros(target.dim, dtype=torch.float64)
    for grads in _datum_gradients(target, theta, x, y, chunk_bytes, advance):
        total += grads.square().sum(0, dtype=torch.float64)
    return total


def hessian(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    y: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> Tensor:
    """Exact Hessian of the negative log likelihood, summed over the data; indefinite away from its minimum.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).
        x: Inputs, (B, ...); the training data when None.
        y: Targets, (B, ...); given together with x.
        chunk_bytes: Bound on the products' buffers held at once.
        advance: Called with the number of data of each finished chunk.

    Returns:
        Symmetric matrix, shape (P, P), float64.
    """
    total = theta.new_zeros(target.dim, target.dim, dtype=torch.float64)
    for rows, part in _hessian_rows(target, theta, x, y, chunk_bytes, advance):
        total[rows] += part
    return _symmetric(total)


def hessian_diagonal(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    y: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
) -> Tensor:
    """Diagonal of `hessian`: P Hessian-vector products, a few rows held at a time.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).
        x: Inputs, (B, ...); the training data when None.
        y: Targets, (B, ...); given together with x.
        chunk_bytes: Bound on the products' buffers held at once.
        advance: Called with the number of data of each finished chunk.

    Returns:
        Vector, shape (P,), float64; entries may be negative.
    """
    total = theta.new_zeros(target.dim, dtype=torch.float64)
    for rows, part in _hessian_rows(target, theta, x, y, chunk_bytes, advance):
        total[rows] += part[:, rows].diagonal()
    return total


def prior_precision(target: Target, theta: Tensor) -> Tensor:
    r"""Curvature of the prior, :math:`A = -\nabla^2 \log p(\theta)`, exact, with the Jacobian of constrained sites.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).

    Returns:
        The diagonal, shape (P,), when A is diagonal (independent priors); otherwise (hierarchical or correlated
        priors) the matrix, shape (P, P), which may be indefinite. float64.
    """
    product = _prior_product(target, theta)
    diagonal = _diagonal_if_diagonal(product, theta)
    if diagonal is not None:
        return diagonal.double()
    return _symmetric(torch.cat([part for _, part in _rows(product, theta)]).double())


def prior_precision_diagonal(target: Target, theta: Tensor) -> Tensor:
    """Diagonal of the prior's curvature, whatever its structure, in O(P) memory.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).

    Returns:
        Vector, shape (P,), float64.
    """
    product = _prior_product(target, theta)
    diagonal = _diagonal_if_diagonal(product, theta)
    if diagonal is not None:
        return diagonal.double()
    return torch.cat([part[:, rows].diagonal() for rows, part in _rows(product, theta)]).double()


def eta_and_jacobian(target: Target, theta: Tensor, x: Any) -> tuple[Tensor, Tensor]:
    r"""The likelihood's unconstrained parameters and their Jacobian, for inputs few enough to hold it.

    Reverse mode: E gradients of one datum for each datum.

    Args:
        target: The compiled model.
        theta: Where to linearise, shape (P,).
        x: Inputs, (B, ...).

    Returns:
        eta, shape (B, E), and :math:`\partial \eta / \partial \theta`, shape (B, E, P).
    """
    eta = target.eta(theta, x)

    def one(t: Tensor, datum: Any) -> Tensor:
        return target.eta(t, data.map_tree(lambda leaf: leaf[None], datum))[0]

    return eta, vmap(jacrev(one), in_dims=(None, 0))(theta, x)


def linearized_moments(
    target: Target,
    gaussian: FlatGaussian,
    theta: Tensor,
    x: Any,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    r"""Predictive moments of the linearised network, :math:`\eta \sim N(\eta^*, J \Sigma J^\top)`, for each input.

    Args:
        target: The compiled model.
        gaussian: Gaussian approximation of the posterior, with covariance :math:`\Sigma`.
        theta: Where to linearise (the mode), shape (P,).
        x: Inputs, (B, ...).
        chunk_bytes: Bound on the Jacobians held at once.

    Returns:
        Means, shape (B, E), and covariances, shape (B, E, E).
    """
    means, covariances = [], []
    for part in _chunks(target, theta, x, chunk_bytes):
        eta, jacobian = eta_and_jacobian(target, theta, part)
        means.append(eta)
        covariances.append(gaussian.quadratic(jacobian))
    return torch.cat(means), torch.cat(covariances)


def linearized_joint(target: Target, gaussian: FlatGaussian, theta: Tensor, x: Any) -> tuple[Tensor, Tensor]:
    r"""As `linearized_moments`, with the covariance between inputs: :math:`J_X \Sigma J_X^\top`, for small batches.

    Args:
        target: The compiled model.
        gaussian: Gaussian approximation of the posterior.
        theta: Where to linearise (the mode), shape (P,).
        x: Inputs, (B, ...).

    Returns:
        Means, shape (B, E), and the covariance, shape (B, E, B, E).
    """
    eta, jacobian = eta_and_jacobian(target, theta, x)
    return eta, gaussian.quadratic(jacobian.flatten(0, 1)).reshape(eta.shape + eta.shape)


def _fisher_and_jacobian(
    target: Target, theta: Tensor, x: Any, chunk_bytes: int, advance: Advance | None
) -> Iterator[tuple[Tensor, Tensor]]:
    # F_n, (B, E, E), and J_n, (B, E, P), chunk by chunk.
    for part in _chunks(target, theta, target.x if x is None else x, chunk_bytes):
        eta, jacobian = eta_and_jacobian(target, theta, part)
        fisher = target.family(part).fisher(target.parameters(theta, part))
        yield fisher, jacobian
        if advance is not None:
            advance(eta.shape[0])


def _chunks(target: Target, theta: Tensor, x: Any, chunk_bytes: int) -> Iterator[Any]:
    # Pieces of x whose Jacobian, its product with the Fisher and the backward buffers stay within the bound.
    num_outputs = target.eta(theta, data.index(x, slice(0, 1))).shape[-1]
    per_datum = 4 * num_outputs * target.dim * theta.element_size()
    for piece in data.chunks(data.num_data(x), max(1, chunk_bytes // per_datum)):
        yield data.index(x, piece)


def _datum_gradients(
    target: Target, theta: Tensor, x: Any, y: Tensor | None, chunk_bytes: int, advance: Advance | None
) -> Iterator[Tensor]:
    # Gradients of each datum's log likelihood, (B, P), chunk by chunk.
    x, y = (target.x, target.y) if x is None or y is None else (x, y)

    def one(t: Tensor, datum: Any, label: Tensor) -> Tensor:
        return target.log_likelihood(t, data.map_tree(lambda leaf: leaf[None], datum), label[None])[0]

    gradients = vmap(grad(one), in_dims=(None, 0, 0))
    for piece in data.chunks(data.num_data(x), max(1, chunk_bytes // (3 * target.dim * theta.element_size()))):
        grads = gradients(theta, data.index(x, piece), y[piece])
        yield grads
        if advance is not None:
            advance(grads.shape[0])


_HESSIAN_BATCH = 1024


def _hessian_rows(
    target: Target, theta: Tensor, x: Any, y: Tensor | None, chunk_bytes: int, advance: Advance | None
) -> Iterator[tuple[slice, Tensor]]:
    # Rows of each data chunk's Hessian: (which rows, their values); chunks of data add up.
    x, y = (target.x, target.y) if x is None or y is None else (x, y)
    for piece in data.chunks(data.num_data(x), _HESSIAN_BATCH):
        inputs, labels = data.index(x, piece), y[piece]

        def energy(t: Tensor, inputs: Any = inputs, labels: Tensor = labels) -> Tensor:
            return -target.log_likelihood(t, inputs, labels).sum()

        # A datum's activations are not known here; P is of their order for dense layers and above it for none.
        buffers = (piece.stop - piece.start) * (target.dim + labels[0].numel())
        yield from _rows(_hessian_product(energy, theta), theta, chunk_bytes=chunk_bytes, floats_per_row=buffers)
        if advance is not None:
            advance(piece.stop - piece.start)


def _hessian_product(energy: Callable[[Tensor], Tensor], theta: Tensor) -> Callable[[Tensor], Tensor]:
    # Reverse over reverse took half the time of forward over reverse here: the inner gradient is recorded once.
    pullback = vjp(grad(energy), theta)[1]
    return lambda tangent: pullback(tangent)[0]


def _prior_product(target: Target, theta: Tensor) -> Callable[[Tensor], Tensor]:
    # The recorded graph of the prior alone: replaying the joint would run the likelihood for every product.
    log_prior = capture(target.log_prior, theta)
    return _hessian_product(lambda t: -log_prior(t), theta)


def _rows(
    product: Callable[[Tensor], Tensor], theta: Tensor, *, chunk_bytes: int = CHUNK_BYTES, floats_per_row: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    # Rows of the symmetric matrix behind a matrix-vector product, a few basis vectors at a time.
    dim = theta.shape[0]
    size = max(1, chunk_bytes // ((4 * dim + floats_per_row) * theta.element_size()))
    for rows in data.chunks(dim, size):
        basis = theta.new_zeros(rows.stop - rows.start, dim)
        basis[:, rows].fill_diagonal_(1.0)
        yield rows, vmap(product)(basis)


def _diagonal_if_diagonal(product: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor | None:
    # The matrix's diagonal if it has nothing else, found with two products: M 1 = diag(M) and M v = diag(M) v.
    diagonal = product(torch.ones_like(theta))
    probe = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=theta.dtype).to(theta.device)
    found, expected = product(probe), diagonal * probe
    tolerance = 1e3 * torch.finfo(theta.dtype).eps * diagonal.abs().max().clamp_min(torch.finfo(theta.dtype).tiny)
    return diagonal if bool(((found - expected).abs() <= tolerance).all()) else None


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
