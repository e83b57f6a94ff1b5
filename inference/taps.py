r"""Inputs and output gradients of every layer of a recorded model: its Jacobian in factored form.

For a layer with weight W (bias as its last column), inputs :math:`a_{nt}` (a one appended) and pre-activations
:math:`z_{nt} = W a_{nt}` at the places t where it is used for datum n (positions of a convolution, tokens of a
sequence, repeated uses of one weight),

.. math:: \frac{\partial}{\partial W} \sum_e c_{ne} \eta_{ne} = \sum_t g_{nt} a_{nt}^\top, \qquad
          g_{nt} = \frac{\partial}{\partial z_{nt}} \sum_e c_{ne} \eta_{ne} .

One forward pass and one backward pass per cotangent c give all of them, without a Jacobian and without special code
in the model. Every layer is checked once against autograd in a random direction; what fails the check, and what is no
layer, is left to the caller as ``rest``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from inference import data
from inference.layer_blocks import (
    LayerBlock,
    Use,
    by_datum,
    disjoint_blocks,
    free_index,
    leading_rows,
    rows_read,
    uses_of,
    without_bias,
)
from inference.layers import find_layers
from inference.programs import Programs
from inference.target import Target

# Recording a graph for two data costs more than passing this many through.
_FEW_DATA = 256


class Pass:
    """Activations of one forward pass, and the backward passes through it.

    Attributes:
        eta: Unconstrained likelihood parameters, (n, E).
        params: Parameters of the observed distribution, each (n, ...).
    """

    def __init__(self, taps: Taps, tape: _Tape, eta: Tensor, params: dict[str, Tensor], skip: int) -> None:
        self._taps, self._tape, self._eta, self._skip = taps, tape, eta, skip
        self.eta = eta[skip:] if tape.differentiable else eta[skip:].detach()
        self.params = {name: value[skip:] for name, value in params.items()}

    def inputs(self, block: LayerBlock) -> Tensor:
        """What a layer read.

        Args:
            block: The layer.

        Returns:
            (n, T, in), or the token ids (n, T) of an embedding.
        """
        return _joined([self._read(use)[self._skip :] for use in block.uses])

    def gradients(self, cotangent: Tensor) -> list[Tensor]:
        r"""Gradients of :math:`\sum_{ne} c_{ne} \eta_{ne}` with respect to the pre-activations.

        Args:
            cotangent: c, (n, E).

        Returns:
            For every block, (n, T, out).
        """
        if self._skip:
            cotangent = torch.cat([cotangent.new_zeros(self._skip, cotangent.shape[1]), cotangent])
        taps, tape = self._taps, self._tape
        names = list(tape.outputs)
        if not names:
            return []
        found = torch.autograd.grad(
            self._eta,
            [tape.outputs[name] for name in names],
            cotangent,
            retain_graph=True,
            create_graph=tape.differentiable,
            allow_unused=True,
        )
        grads = dict(zip(names, found, strict=True))
        return [
            _joined([self._written(use, grads[use.layer.node])[self._skip :] for use in block.uses])
            for block in taps.blocks
        ]

    def all_gradients(self, columns: Tensor | None = None) -> list[Tensor]:
        """Gradients for several cotangents, held together.

        Args:
            columns: Cotangents, (n, E, C); every eta on its own when None.

        Returns:
            For every block, (n, C, T, out).
        """
        if columns is None:
            unit = torch.eye(self.eta.shape[1], dtype=self.eta.dtype, device=self.eta.device)
            columns = unit.expand(len(self.eta), *unit.shape)
        found = [self.gradients(column) for column in columns.unbind(-1)] if self._taps.blocks else []
        return [_stacked(parts) for parts in zip(*found, strict=True)]

    def _read(self, use: Use) -> Tensor:
        value, size = self._tape.inputs[use.layer.input], self._eta.shape[0]
        if use.layer.kind == "embedding":
            return by_datum(value.reshape(-1, 1), use.after, size)
        return by_datum(rows_read(value, use), use.after, size)

    def _written(self, use: Use, grad: Tensor | None) -> Tensor:
        value, size = self._tape.outputs[use.layer.node], self._eta.shape[0]
        grad = grad if grad is not None else torch.zeros_like(value)
        if use.layer.kind == "embedding":
            tokens = self._tape.inputs[use.layer.input]
            grad = grad * use.layer.weight_scale
            if use.padding >= 0:
                grad = grad.masked_fill((tokens == use.padding).unsqueeze(-1), 0.0)
        rows = leading_rows(grad, use)
        if use.layer.kind == "conv":
            rows = grad.flatten(2).mT.chunk(use.groups, -1)[use.group]
        else:
            rows = rows.unsqueeze(1)
        return by_datum(rows, use.after, size)


class Taps:
    """Where to tap a model recorded for inputs of one shape.

    Args:
        target: The model; of a restricted one, only free entries make up blocks.
        theta: Where the layers are checked, (P,).
        x: Inputs of that shape.

    Attributes:
        blocks: The layers.
        rest: Entries of theta outside all blocks, ascending.
    """

    def __init__(self, target: Target, theta: Tensor, x: data.Tree) -> None:
        programs, full = target.programs, target.expand(theta)
        self._captured = programs._get("parameters", programs._parameters, full, x)
        self._names = sorted(target.family(x).names)
        layers = find_layers(self._captured.module, target.all_sites)
        nodes = {node.name: node for node in self._captured.module.graph.nodes}
        self.blocks: tuple[LayerBlock, ...] = ()
        candidates = disjoint_blocks(uses_of(layers, nodes), free_index(target))
        self.blocks = self._checked(target, theta, x, candidates)
        covered = torch.zeros(target.dim, dtype=torch.bool)
        for block in self.blocks:
            covered[block.positions.reshape(-1)] = True
        self.rest = (~covered).nonzero()[:, 0].to(theta.device)
        self.blocks = tuple(replace(b, positions=b.positions.to(theta.device)) for b in self.blocks)

    def run(self, target: Target, theta: Tensor, x: data.Tree, *, skip: int = 0) -> Pass:
        """Run the model forward.

        Args:
            target: The model.
            theta: (P,).
            x: Inputs of the recorded shape, (B, ...); where one requires a gradient, so does all that is returned.
            skip: Leading inputs to leave out of what is returned.

        Returns:
            The pass.
        """
        leaves = pytree.tree_leaves(x)
        differentiable = any(leaf.requires_grad for leaf in leaves)
        uses = [use for block in self.blocks for use in block.uses]
        return self._run(target, target.expand(theta).detach(), x, uses, differentiable, skip)

    def _run(
        self, target: Target, full: Tensor, x: data.Tree, uses: list[Use], differentiable: bool, skip: int = 0
    ) -> Pass:
        tape = _Tape(self._captured.module, uses, differentiable)
        x = data.map_tree(Tensor.contiguous, x)
        with torch.enable_grad():
            out = tape.run(full.contiguous(), *pytree.tree_leaves(x))
            params = dict(zip(self._names, out, strict=True))
            eta = target.family(x).to_eta(params)
        if not differentiable:
            params = {name: value.detach() for name, value in params.items()}
        return Pass(self, tape, eta, params, skip)

    def _checked(self, target: Target, theta: Tensor, x: data.Tree, blocks: list[LayerBlock]) -> tuple[LayerBlock, ...]:
        """The blocks whose gradient in a random direction is autograd's, with their layouts."""
        if not blocks:
            return ()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype).to(theta.device)
        point = (theta + 0.05 * noise * (theta.abs() + 0.1)).detach().requires_grad_()
        size = data.num_data(x)
        datum = size // 2
        uses = [use for block in blocks for use in block.uses]
        x = data.map_tree(Tensor.detach, x)
        probe = self._run(target, target.expand(point), x, uses, False)
        direction = torch.randn(probe._eta.shape[1], generator=generator, dtype=theta.dtype).to(theta.device)
        cotangent = torch.zeros_like(probe._eta)
        cotangent[datum] = direction
        names = list(probe._tape.outputs)
        values = [point, *(probe._tape.outputs[name] for name in names)]
        found = torch.autograd.grad(probe._eta, values, cotangent, allow_unused=True)
        expected = torch.zeros_like(point) if found[0] is None else found[0]
        grads: dict[str, Tensor | None] = dict(zip(names, found[1:], strict=True))
        kept = []
        for block in blocks:
            for candidate in (block, *without_bias(block)):
                laid_out = _laid_out(candidate, grads, datum, size)
                if laid_out is not None and _agrees(probe, laid_out, grads, expected, datum):
                    kept.append(laid_out)
                    break
        return tuple(kept)


_TAPS: WeakKeyDictionary[Programs, dict[Any, Taps]] = WeakKeyDictionary()


def taps_for(target: Target, theta: Tensor, x: data.Tree) -> Taps:
    """Taps for inputs of this shape, found and checked on first use.

    Args:
        target: The model.
        theta: Where to check them, (P,).
        x: Inputs.

    Returns:
        The taps.
    """
    cache = _TAPS.setdefault(target.programs, {})
    key = (data.shapes(x), target.kept, theta.device)
    if key not in cache:
        cache[key] = Taps(target, theta, x)
    return cache[key]


def passes(target: Target, theta: Tensor, x: data.Tree, size: int) -> Iterator[tuple[slice, Taps, Pass]]:
    """Forward passes over chunks of the inputs, all of one shape: the last chunk is taken full and cut afterwards.

    Args:
        target: The model.
        theta: (P,).
        x: Inputs, every leaf (N, ...).
        size: Largest chunk.

    Yields:
        The inputs covered, the taps and the pass.
    """
    total = data.num_data(x)
    size = math.ceil(total / math.ceil(total / size))
    for rows, skip in data.full_chunks(total, size):
        part = data.index(x, rows)
        taps = taps_for(target, theta, part)
        yield slice(rows.start + skip, rows.stop), taps, taps.run(target, theta, part, skip=skip)


def few(target: Target, x: data.Tree) -> data.Tree:
    """Two of many inputs, where two are enough to know the likelihood by; all of few inputs.

    Args:
        target: The model.
        x: Inputs, every leaf (N, ...).

    Returns:
        Inputs to record a small graph for.
    """
    if data.num_data(x) <= _FEW_DATA or target.programs.traced.local_sites:
        return x
    return data.index(x, slice(0, 2))


def num_outputs(target: Target, theta: Tensor, x: data.Tree) -> int:
    """Number E of entries of eta for one datum, read off a recorded graph.

    Args:
        target: The model.
        theta: (P,), should nothing have been recorded yet.
        x: Inputs, likewise.

    Returns:
        E.
    """
    recorded = next((held for key, held in target.programs.cache.items() if key[0] == "parameters"), None)
    if recorded is None:
        return target.eta(theta, few(target, x)).shape[-1]
    family = target.family(few(target, x))
    graph = recorded.module.graph
    nodes = next(n for n in graph.nodes if n.op == "output").args[0]
    values = [node.meta["val"] for node in nodes]
    by_name = dict(zip(sorted(family.names), values, strict=True))
    return sum(by_name[name].numel() // by_name[name].shape[0] for name in family.eta_names)


def activation_sizes(target: Target) -> tuple[dict[str, int], int]:
    """Sizes of the results that depend on the data in a forward pass.

    Args:
        target: The model.

    Returns:
        Numbers of entries by name of the node, and the number of data that they belong to.
    """
    graph = target.recorded_any().graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    reads_data, numel = set(inputs[1:]), {}
    for node in graph.nodes:
        if node.op == "call_function" and not reads_data.isdisjoint(node.all_input_nodes):
            reads_data.add(node)
            value = node.meta.get("val")
            numel[node.name] = value.numel() if isinstance(value, Tensor) else 0
    return numel, target.recorded_rows


def floats_per_datum(target: Target, columns: int, matrices: int = 0) -> int:
    """Numbers held for one datum by a forward pass, its layers' inputs and ``columns`` of their output gradients.

    Args:
        target: The model.
        columns: Cotangents whose gradients are held together.
        matrices: Of layers used at several places, gradients with respect to the weight that are held together.

    Returns:
        Number of floats.
    """
    numel, total = activation_sizes(target)
    floats = sum(numel.values())
    for layer in target.layers:
        out = numel.get(layer.node, 0)
        places = out // layer.fan_out
        floats += out * columns + places * (layer.fan_in + 1)
        if places > total and layer.kind != "embedding":
            floats += 2 * matrices * layer.fan_out * (layer.fan_in + 1) * total
    return max(1, floats // total)


def _joined(parts: list[Tensor]) -> Tensor:
    """Places of all uses of a weight, (n, T, width); of a single one, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """Several (n, T, width) as one (n, C, T, width), copied in the order that they have in memory."""
    if parts[0].stride(-1) == 1:
        return torch.stack(parts, 1)
    return torch.stack([part.mT for part in parts], 1).mT


class _Tape(fx.Interpreter):
    """Runs a graph and keeps what layers read and write."""

    def __init__(self, module: fx.GraphModule, uses: list[Use], differentiable: bool) -> None:
        super().__init__(module)
        self.differentiable = differentiable
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._read = {use.layer.input for use in uses}
        self._written = {use.layer.node for use in uses}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._read:
            self.inputs[n.name] = result if self.differentiable else result.detach()
        if n.name in self._written:
            if not result.requires_grad:
                result.requires_grad_()
            self.outputs[n.name] = result
        return result


def _laid_out(block: LayerBlock, grads: dict[str, Tensor | None], datum: int, size: int) -> LayerBlock | None:
    """The block with the order of its rows, read off which rows' gradients one datum moves."""
    uses = []
    for use in block.uses:
        grad = grads[use.layer.node]
        if grad is None:
            return None
        moved = leading_rows(grad, use).ne(0).any(1)
        if moved.shape[0] % size:
            return None
        per = moved.shape[0] // size
        rows = torch.arange(moved.shape[0], device=moved.device)
        fits = []
        for after in (d for d in range(per, 0, -1) if per % d == 0):
            own = (rows // after) % size == datum
            if not bool((moved & ~own).any()):
                fits.append((int((own & ~moved).sum()), -after))
        if not fits:
            return None
        uses.append(replace(use, after=-min(fits)[1]))
    return replace(block, uses=tuple(uses))


def _agrees(probe: Pass, block: LayerBlock, grads: dict[str, Tensor | None], expected: Tensor, datum: int) -> bool:
    """Whether the factored gradient of one datum is the one autograd gives."""
    truth = expected[block.positions.to(expected.device)]
    total = torch.zeros_like(truth)
    for use in block.uses:
        a, g = probe._read(use)[datum], probe._written(use, grads[use.layer.node])[datum]  # (T, in), (T, out)
        if block.kind == "embedding":
            total.index_add_(1, a.reshape(-1), g.mT)
        else:
            total += g.mT @ a
    scale = truth.abs().max()
    tolerance = 1e-3 if truth.dtype == torch.float32 else 1e-7
    return bool((total - truth).abs().max() <= tolerance * scale) and bool(scale.isfinite())
