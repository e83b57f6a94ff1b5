r"""Jacobians of the likelihood's parameters, and the moments of a linearised network under a Gaussian over its weights.

.. math:: \eta_{lin}(x) = \eta(x, \theta^*) + J(x)(\theta - \theta^*), \qquad
          \eta_{lin}(x) \sim N(\eta(x, \theta^*), J \Sigma J^\top)

A layer's Jacobian is an outer product of its input and its output gradient (see :mod:`inference.taps`): Gaussians that
are diagonal or Kronecker-factored contract it without forming it. Chunks of data are sized in bytes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.func import jacrev, jvp, vmap
from torch.nn import functional

from inference import data
from inference.distributions import DenseGaussian, DiagonalGaussian, FlatGaussian, KroneckerGaussian
from inference.kronecker_gaussian import KroneckerBlock, layer_jacobian
from inference.layer_blocks import LayerBlock
from inference.tape import Pass
from inference.taps import Taps, floats_per_datum, num_outputs, passes
from inference.target import Target

CHUNK_BYTES = 32 * 2**20
"""Default bound on what is held at once for a chunk of data."""

Advance = Callable[[int], object]
# Up to this many entries of theta, one product per entry is cheaper than reverse mode for each datum.
_FEW = 16


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
    entries = torch.arange(target.dim, device=theta.device)
    return target.eta(theta, x), _reverse(target, theta, x, entries)


def entries_jacobian(target: Target, theta: Tensor, x: Any, entries: Tensor) -> Tensor:
    """Jacobian with respect to some entries of theta: forward mode for a few of them, else reverse mode.

    Args:
        target: The compiled model.
        theta: Where to linearise, shape (P,).
        x: Inputs, (B, ...).
        entries: Index into theta, (R,).

    Returns:
        Jacobian, shape (B, E, R).
    """
    if len(entries) > _FEW:
        return _reverse(target, theta, x, entries)
    columns = []
    for entry in entries.tolist():
        tangent = torch.zeros_like(theta)
        tangent[entry] = 1.0
        columns.append(jvp(lambda t: target.eta(t, x), (theta,), (tangent,))[1])
    return torch.stack(columns, -1)


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
        chunk_bytes: Bound on what is held at once.

    Returns:
        Means, shape (B, E), and covariances, shape (B, E, E).
    """
    return linearised(target, gaussian, theta, x, chunk_bytes=chunk_bytes)[:2]


def linearised(
    target: Target,
    gaussian: FlatGaussian,
    theta: Tensor,
    x: Any,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `linearized_moments`, with the parameters of the observed distribution at ``theta`` from the same pass.

    Args:
        target: The compiled model.
        gaussian: Gaussian approximation of the posterior.
        theta: Where to linearise (the mode), shape (P,).
        x: Inputs, (B, ...).
        chunk_bytes: Bound on what is held at once.

    Returns:
        Means, shape (B, E), covariances, shape (B, E, E), and parameters by name, each (B, ...).
    """
    if peek_interpreter_stack() is not None:  # inside vmap or grad of torch.func, where the taps cannot go
        eta, jacobian = eta_and_jacobian(target, theta, x)
        return eta, gaussian.quadratic(jacobian), target.parameters(theta, x)
    parts = [(done.eta, found, done.params) for done, found in _covariances(target, gaussian, theta, x, chunk_bytes)]
    means, covariances, params = zip(*parts, strict=True)
    joined = {name: torch.cat([part[name] for part in params]) for name in params[0]}
    return torch.cat(means), torch.cat(covariances), joined


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
    if peek_interpreter_stack() is not None or not isinstance(gaussian, (DiagonalGaussian, KroneckerGaussian)):
        eta, jacobian = eta_and_jacobian(target, theta, x)
        return eta, gaussian.joint(jacobian)
    ((_, taps, done),) = passes(target, theta, x, data.num_data(x))
    pairs, others = _matched(gaussian, taps)
    gradients = dict(zip(taps.blocks, done.all_gradients(), strict=True))
    total = done.eta.new_zeros(done.eta.shape + done.eta.shape)
    for block, layer in pairs:
        total = total + block.joint_covariance(done.inputs(layer), gradients[layer])
    for block, jacobian in _unmatched(target, theta, x, others):
        rows = block.roots(jacobian).flatten(0, 1)
        total = total + (rows @ rows.mT).reshape(total.shape)
    return done.eta, total


def assembled(target: Target, theta: Tensor, x: Any, taps: Taps, done: Pass) -> Tensor:
    """Jacobian put together from the layers' inputs and output gradients.

    Args:
        target: The compiled model.
        theta: Where to linearise, shape (P,).
        x: Inputs of the pass, (n, ...).
        taps: Where the layers are.
        done: The forward pass.

    Returns:
        Jacobian, shape (n, E, P).
    """
    jacobian = done.eta.new_zeros((*done.eta.shape, target.dim))
    if len(taps.rest):
        jacobian[..., taps.rest] = entries_jacobian(target, theta, x, taps.rest)
    for block, gradients in zip(taps.blocks, done.all_gradients(), strict=True):
        inputs = done.inputs(block)
        if block.kind == "embedding":
            inputs = functional.one_hot(inputs, block.positions.shape[1]).to(gradients)
        jacobian[..., block.positions] = layer_jacobian(inputs, gradients)
    return jacobian


def once_used(taps: Taps, done: Pass) -> LayerBlock | None:
    """The layer, if it is all of theta and every datum passes it once.

    Args:
        taps: Where the layers are.
        done: A forward pass.

    Returns:
        The layer or None.
    """
    if len(taps.blocks) != 1 or len(taps.rest) or taps.blocks[0].kind == "embedding":
        return None
    return taps.blocks[0] if done.inputs(taps.blocks[0]).shape[1] == 1 else None


def chunk_size(floats: int, theta: Tensor, chunk_bytes: int) -> int:
    """Number of data whose ``floats`` numbers each stay within the bound; at least 1."""
    return max(1, chunk_bytes // (floats * theta.element_size()))


def _covariances(
    target: Target, gaussian: FlatGaussian, theta: Tensor, x: Any, chunk_bytes: int
) -> Iterator[tuple[Pass, Tensor]]:
    """Function covariances of chunks of data, by the cheapest way the Gaussian's structure allows."""
    if isinstance(gaussian, (DiagonalGaussian, KroneckerGaussian)):
        yield from _factored(target, gaussian, theta, x, chunk_bytes)
    elif isinstance(gaussian, DenseGaussian):
        yield from _dense(target, gaussian, theta, x, chunk_bytes)
    else:
        outputs = num_outputs(target, theta, x)
        floats = 4 * outputs * target.dim + floats_per_datum(target, outputs)
        for rows, taps, done in passes(target, theta, x, chunk_size(floats, theta, chunk_bytes)):
            yield done, gaussian.quadratic(assembled(target, theta, data.index(x, rows), taps, done))


def _factored(
    target: Target, gaussian: DiagonalGaussian | KroneckerGaussian, theta: Tensor, x: Any, chunk_bytes: int
) -> Iterator[tuple[Pass, Tensor]]:
    outputs = num_outputs(target, theta, x)
    held: Taps | None = None
    pairs: list[tuple[KroneckerBlock, LayerBlock]] = []
    others: list[KroneckerBlock] = []
    floats = floats_per_datum(target, outputs, matrices=outputs)
    for rows, taps, done in passes(target, theta, x, chunk_size(floats, theta, chunk_bytes)):
        if taps is not held:
            pairs, others = _matched(gaussian, taps)
            held = taps
        gradients = dict(zip(taps.blocks, done.all_gradients(), strict=True))
        total = done.eta.new_zeros((*done.eta.shape, outputs))
        for block, layer in pairs:
            total = total + block.function_covariance(done.inputs(layer), gradients[layer])
        for block, jacobian in _unmatched(target, theta, data.index(x, rows), others):
            root = block.roots(jacobian)
            total = total + root @ root.mT
        yield done, total


def _dense(
    target: Target, gaussian: DenseGaussian, theta: Tensor, x: Any, chunk_bytes: int
) -> Iterator[tuple[Pass, Tensor]]:
    """A dense covariance: that of one layer is contracted with the inputs first, any other with the Jacobian."""
    outputs = num_outputs(target, theta, x)
    single = may_be_one_layer(target)
    floats = (2 if single else 4 * outputs) * target.dim + floats_per_datum(target, outputs)
    pieces: list[Tensor] = []  # covariances of the rows of one layer's weight, each (in, in)
    for rows, taps, done in passes(target, theta, x, chunk_size(floats, theta, chunk_bytes)):
        block = once_used(taps, done) if single else None
        if block is None:
            yield done, gaussian.quadratic(assembled(target, theta, data.index(x, rows), taps, done))
            continue
        order, own = block.positions, torch.triu_indices(len(block.positions), len(block.positions))
        pieces = pieces or [gaussian.dense[order[i][:, None], order[j]] for i, j in own.mT.tolist()]
        inputs, gradients = done.inputs(block)[:, 0], done.all_gradients()[0][:, :, 0]
        between = inputs.new_empty(len(inputs), len(order), len(order))  # of the layer's own outputs
        between[:, own[0], own[1]] = torch.stack([((inputs @ piece) * inputs).sum(-1) for piece in pieces], -1)
        between[:, own[1], own[0]] = between[:, own[0], own[1]]
        yield done, gradients @ between @ gradients.mT


def may_be_one_layer(target: Target) -> bool:
    """Whether a layer has as many entries as theta, so that the rest need not be looked at.

    Args:
        target: The model.

    Returns:
        False where it certainly is not one layer.
    """
    biases = [0 if layer.bias_positions is None else layer.bias_positions.numel() for layer in target.layers]
    sizes = [layer.positions.numel() for layer in target.layers]
    return any(target.dim in (size, size + bias) for size, bias in zip(sizes, biases, strict=True))


def _matched(
    gaussian: DiagonalGaussian | KroneckerGaussian, taps: Taps
) -> tuple[list[tuple[KroneckerBlock, LayerBlock]], list[KroneckerBlock]]:
    """Blocks of the covariance with the layers they are the covariance of, and those that are no layer's."""
    if isinstance(gaussian, DiagonalGaussian):
        variance = gaussian.variance
        pairs = [(KroneckerBlock(b.positions, variance[b.positions]), b) for b in taps.blocks]
        rest = taps.rest[:, None]
        return pairs, [KroneckerBlock(rest, variance[rest])] if len(rest) else []
    pairs, others = [], []
    for block in gaussian.blocks:
        layer = next((b for b in taps.blocks if torch.equal(b.positions, block.positions)), None)
        if layer is None:
            others.append(block)
        else:
            pairs.append((block, layer))
    return pairs, others


def _unmatched(
    target: Target, theta: Tensor, x: Any, blocks: list[KroneckerBlock]
) -> Iterator[tuple[KroneckerBlock, Tensor]]:
    """Blocks with their Jacobians, (n, E, out, in)."""
    if not blocks:
        return
    sizes = [block.positions.numel() for block in blocks]
    jacobian = entries_jacobian(target, theta, x, torch.cat([block.positions.flatten() for block in blocks]))
    for block, piece in zip(blocks, jacobian.split(sizes, -1), strict=True):
        yield block, piece.unflatten(-1, block.positions.shape)


def _reverse(target: Target, theta: Tensor, x: Any, entries: Tensor) -> Tensor:
    def one(values: Tensor, datum: Any) -> Tensor:
        point = theta.index_put((entries,), values)
        return target.eta(point, data.map_tree(lambda leaf: leaf[None], datum))[0]

    return vmap(jacrev(one), in_dims=(None, 0))(theta[entries], x)
