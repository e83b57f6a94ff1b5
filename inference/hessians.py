r"""Exact second derivatives: the Hessian of the likelihood and the prior's precision.

Of the *negative log likelihood summed over the data* and of the negative log prior, in nats and not tempered, in
unconstrained space with the Jacobians of constrained sites. Returned in float64 whatever the model's dtype.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad, vjp, vmap

from inference import data
from inference.errors import UnsupportedModelError
from inference.graph import capture
from inference.jacobians import CHUNK_BYTES, Advance
from inference.taps import few
from inference.target import Target


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
    return prior_diagonal(target, theta)[0]


def prior_diagonal(target: Target, theta: Tensor) -> tuple[Tensor, bool]:
    """As `prior_precision_diagonal`, and whether that is all of the prior's curvature.

    Args:
        target: The compiled model.
        theta: Where to differentiate, shape (P,).

    Returns:
        Vector, shape (P,), float64, and whether the curvature is diagonal.
    """
    product = _prior_product(target, theta)
    diagonal = _diagonal_if_diagonal(product, theta)
    if diagonal is not None:
        return diagonal.double(), True
    return torch.cat([part[:, rows].diagonal() for rows, part in _rows(product, theta)]).double(), False


def prior_alone(target: Target) -> Callable[[Tensor], Tensor]:
    """The log prior by itself, cut out of the recorded joint density where it does not read the data.

    Args:
        target: The compiled model.

    Returns:
        Function from theta (P,) to nats, ().
    """
    graph = prior_graph(target)
    if graph is None:
        return target.log_prior
    return lambda theta: graph(target.expand(theta).contiguous())


def prior_graph(target: Target) -> fx.GraphModule | None:
    """Graph of the log prior, from the full theta, cut out of the recorded joint density.

    Args:
        target: The compiled model.

    Returns:
        The graph, or None where the prior reads the data.
    """
    if target.programs.any_joint() is None:
        x = few(target, target.x)
        theta = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
        try:
            target.programs.joint(target.expand(theta), x, target.y[: data.num_data(x)])
        except UnsupportedModelError:  # a prior that reads all data
            return None
    module = target.recorded_any()
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(module.graph, {})
    graph.output(outputs[0])
    graph.eliminate_dead_code()
    _, *inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if any(node.users for node in inputs):
        return None
    for node in inputs:
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


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
    log_prior = capture(prior_alone(target), theta)
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
