r"""Curvature of a target: generalised Gauss-Newton and Fisher matrices, and their diagonals.

With :math:`\eta_n(\theta)` the likelihood's unconstrained parameters for datum n (E of them),
:math:`J_n = \partial \eta_n / \partial \theta` and :math:`F_n` the Fisher information of one datum in them,

.. math:: H_{GGN} = \sum_n J_n^\top F_n J_n .

All curvatures here are of the *negative log likelihood summed over the data*, in nats and not tempered; exact second
derivatives and the prior's are in :mod:`inference.hessians`. They are accumulated and returned in float64 whatever the
model's dtype: a GGN summed in float32 plus a weak prior is often no longer positive definite.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from inference import data
from inference.jacobians import (
    CHUNK_BYTES,
    Advance,
    assembled,
    chunk_size,
    entries_jacobian,
    may_be_one_layer,
    once_used,
)
from inference.layer_blocks import LayerBlock
from inference.tape import Pass
from inference.taps import Slope, floats_per_datum, num_outputs, passes
from inference.target import Target


def ggn(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
    slope: Slope | None = None,
) -> Tensor:
    r"""Generalised Gauss-Newton matrix :math:`\sum_n J_n^\top F_n J_n`, the Hessian of the linearised model.

    Positive semi-definite; equal to the exact Hessian where eta is linear in theta and its Hessian free of y.

    Args:
        target: The compiled model; its likelihood family supplies F_n in closed form.
        theta: Where to linearise, shape (P,).
        x: Inputs, (B, ...); the training inputs when None.
        chunk_bytes: Bound on the Jacobians held at once.
        advance: Called with the number of data of each finished chunk, for progress bars.
        slope: Collects the log likelihood of the training data and its gradient from the same passes.

    Returns:
        Symmetric matrix, shape (P, P), float64.
    """
    x = target.x if x is None else x
    total = theta.new_zeros(target.dim, target.dim, dtype=torch.float64)
    outputs = num_outputs(target, theta, x)
    single = may_be_one_layer(target)
    floats = (2 if single else 4 * outputs) * target.dim + floats_per_datum(target, outputs)
    layer = _OneLayer()
    for rows, taps, done in passes(target, theta, x, chunk_size(floats, theta, chunk_bytes), slope):
        fisher = target.fisher_family(taps.family, data.index(x, rows)).fisher(done.params).double()
        block = once_used(taps, done) if single else None
        if block is not None:
            layer.add(block, done, fisher)
        else:
            jacobian = assembled(target, theta, data.index(x, rows), taps, done).double()
            total.addmm_((fisher @ jacobian).flatten(0, 1).mT, jacobian.flatten(0, 1))
        if advance is not None:
            advance(len(fisher))
    return _symmetric(layer.added_to(total))


def ggn_diagonal(
    target: Target,
    theta: Tensor,
    *,
    x: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Advance | None = None,
    slope: Slope | None = None,
) -> Tensor:
    r"""Diagonal of `ggn`, without forming the matrix or a Jacobian.

    With F = R R^T and one backward pass for each column of R, a layer's part is
    :math:`\sum_n (\sum_c g_{nc}^2)\,(a_n^2)^\top` where every datum passes through it once, and
    :math:`\sum_{nc} (\sum_t g_{nct} a_{nt}^\top)^2` otherwise.

    Args:
        target: The compiled model.
        theta: Where to linearise, shape (P,).
        x: Inputs, (B, ...); the training inputs when None.
        chunk_bytes: Bound on what is held at once.
        advance: Called with the number of data of each finished chunk.
        slope: Collects the log likelihood of the training data and its gradient from the same passes.

    Returns:
        Non-negative vector, shape (P,), float64.
    """
    x = target.x if x is None else x
    total = theta.new_zeros(target.dim, dtype=torch.float64)
    blocks: tuple[LayerBlock, ...] = ()
    parts: list[Tensor] = []
    outputs = num_outputs(target, theta, x)
    size = chunk_size(floats_per_datum(target, 2 * outputs, matrices=outputs), theta, chunk_bytes)
    for rows, taps, done in passes(target, theta, x, size, slope):
        part = data.index(x, rows)
        root = target.fisher_family(taps.family, part).fisher_root(done.params)
        blocks = taps.blocks
        parts = parts or [total.new_zeros(block.positions.shape) for block in blocks]
        for block, held, gradients in zip(blocks, parts, done.all_gradients(root), strict=True):
            own = theta.new_zeros(held.shape)
            if gradients.shape[2] == 1:
                _add_once(own, block, done.inputs(block)[:, 0], gradients[:, :, 0].square().sum(1))
            else:
                _add_squares(own, block, done.inputs(block), gradients)
            held += own
        if len(taps.rest):
            _add_rest(total, target, theta, part, taps.rest, root, chunk_bytes)
        if advance is not None:
            advance(rows.stop - rows.start)
    for block, held in zip(blocks, parts, strict=True):
        total[block.positions] = held
    return total


def ggn_product(
    target: Target, theta: Tensor, vector: Tensor, *, x: Any = None, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    r"""Product :math:`H_{GGN} v`: one forward-mode and one reverse-mode pass over the data.

    Args:
        target: The compiled model.
        theta: Where to linearise, shape (P,).
        vector: v, shape (P,).
        x: Inputs, (B, ...); the training inputs when None.
        chunk_bytes: Bound on the activations held at once.

    Returns:
        Product, shape (P,), float64.
    """
    x = target.x if x is None else x
    total = theta.new_zeros(target.dim, dtype=torch.float64)
    size = chunk_size(3 * floats_per_datum(target, 1), theta, chunk_bytes)
    for rows in data.chunks(data.num_data(x), size):
        part = data.index(x, rows)

        def eta(t: Tensor, part: Any = part) -> Tensor:
            return target.eta(t, part)

        fisher = target.family(part).fisher(target.parameters(theta, part))
        pushed = jvp(eta, (theta,), (vector,))[1]
        total += vjp(eta, theta)[1]((fisher @ pushed.unsqueeze(-1)).squeeze(-1))[0]
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


def sampled_labels(target: Target, theta: Tensor, seed: int, *, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """One target for each training input, drawn from the model; the global random state is not touched.

    Args:
        target: The compiled model.
        theta: Parameters to draw at, shape (P,).
        seed: Random seed.
        chunk_bytes: Bound on what is held at once.

    Returns:
        Targets, shape (N, ...).
    """
    drawn = []
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for _, taps, done in passes(
            target, theta, target.x, chunk_size(floats_per_datum(target, 0), theta, chunk_bytes)
        ):
            drawn.append(taps.family.distribution(done.params).sample())
    return torch.cat(drawn)


class _OneLayer:
    r"""GGN of a network that is one layer, :math:`\sum_n (g_n^\top F_n g_n) \otimes (a_n a_n^\top)`.

    2 E times cheaper than by its Jacobian.
    """

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._rows: list[Tensor] = []  # for every row of the weight, (in, in) with itself and with each row below

    def add(self, block: LayerBlock, done: Pass, fisher: Tensor) -> None:
        """Add one chunk."""
        inputs = done.inputs(block)[:, 0].double()
        gradients = done.all_gradients()[0][:, :, 0].double()
        between = gradients.mT @ fisher @ gradients  # (n, out, out)
        if self._positions is None:
            out, columns = block.positions.shape
            self._positions = block.positions
            self._rows = [inputs.new_zeros(columns, (out - i) * columns) for i in range(out)]
        for i, row in enumerate(self._rows):
            row.addmm_(inputs.mT, (between[:, i, i:].unsqueeze(-1) * inputs.unsqueeze(1)).flatten(1))

    def added_to(self, total: Tensor) -> Tensor:
        """Put the blocks where they belong."""
        for i, row in enumerate(self._rows):
            assert self._positions is not None
            rows, below = self._positions[i], self._positions[i:]
            for j, block in enumerate(row.unflatten(1, below.shape).unbind(1)):
                total[rows[:, None], below[j]] += block
                if j:
                    total[below[j][:, None], rows] += block.mT
        return total


def _add_squares(total: Tensor, block: LayerBlock, inputs: Tensor, gradients: Tensor) -> None:
    """Add the squares of each datum's gradients (out, in), for a weight that is used at several places."""
    if block.kind != "embedding":
        every = gradients.mT.flatten(1, 2) @ inputs  # (n, C out, in)
        total += every.square_().sum(0).unflatten(0, (-1, len(total))).sum(0)
        return
    same = (inputs.unsqueeze(-1) == inputs.unsqueeze(-2)).to(gradients)  # (n, T, T)
    products = (gradients * (same.unsqueeze(1) @ gradients)).sum(1)
    total.index_add_(1, inputs.flatten(), products.flatten(0, 1).mT)


def _add_once(total: Tensor, block: LayerBlock, inputs: Tensor, squares: Tensor) -> None:
    """Add the squares for a weight that every datum passes once: inputs (n, in) or tokens (n,), squares (n, out)."""
    if block.kind == "embedding":
        total.index_add_(1, inputs, squares.mT)
    else:
        total.addmm_(squares.mT, inputs.square())


def _add_rest(
    total: Tensor, target: Target, theta: Tensor, x: Any, rest: Tensor, root: Tensor, chunk_bytes: int
) -> None:
    """Add the diagonal for entries outside the layers, from their Jacobian."""
    size = chunk_size(4 * root.shape[1] * len(rest), theta, chunk_bytes)
    for piece in data.chunks(len(root), size):
        jacobian = entries_jacobian(target, theta, data.index(x, piece), rest)
        total[rest] += (root[piece].mT @ jacobian).square().sum((0, 1), dtype=torch.float64)


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


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
