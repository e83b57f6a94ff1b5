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
from torch import Tensor
from torch.utils import _pytree as pytree

from inference import data
from inference.layer_blocks import (
    LayerBlock,
    Use,
    disjoint_blocks,
    free_index,
    leading_rows,
    uses_of,
    without_bias,
)
from inference.layers import find_layers
from inference.programs import Programs
from inference.tape import Pass, Tape
from inference.target import Target

# Recording a graph for two data costs more than passing this many through.
_FEW_DATA = 256


class Taps:
    """Where to tap a model recorded for inputs of one shape.

    Args:
        target: The model; of a restricted one, only free entries make up blocks.
        theta: Where the layers are checked, (P,).
        x: Inputs of that shape.
        y: Targets, where the log likelihood is wanted as well.

    Attributes:
        blocks: The layers.
        rest: Entries of theta outside all blocks, ascending.
        family: The likelihood.
        sloped: Whether layers and rest give the gradient of the log likelihood; not where a factor reads a weight
            past its layer.
    """

    def __init__(self, target: Target, theta: Tensor, x: data.Tree, y: Tensor | None = None) -> None:
        programs, full = target.programs, target.expand(theta)
        if y is None:
            self._captured = programs._get("parameters", programs._parameters, full, x)
        else:
            self._captured = programs._get("observed", programs._observed, full, x, y)
        with torch.no_grad():  # what all targets of these programs have in common: they share the taps
            self.family = programs.family(theta.new_zeros(()), few(target, x))
        self._names = sorted(self.family.names)
        layers = find_layers(self._captured.module, target.all_sites)
        nodes = {node.name: node for node in self._captured.module.graph.nodes}
        self.blocks: tuple[LayerBlock, ...] = ()
        self.sloped = y is not None
        candidates = disjoint_blocks(uses_of(layers, nodes), free_index(target))
        self.blocks = self._checked(target, theta, x, y, candidates)
        covered = torch.zeros(target.dim, dtype=torch.bool)
        for block in self.blocks:
            covered[block.positions.reshape(-1)] = True
        self.rest = (~covered).nonzero()[:, 0].to(theta.device)
        self.blocks = tuple(replace(b, positions=b.positions.to(theta.device)) for b in self.blocks)

    def run(self, target: Target, theta: Tensor, x: data.Tree, y: Tensor | None = None, *, skip: int = 0) -> Pass:
        """Run the model forward.

        Args:
            target: The model.
            theta: (P,); where it requires a gradient, `Pass.slope` can give that of all of it.
            x: Inputs of the recorded shape, (B, ...); where one requires a gradient, so does all that is returned.
            y: Targets, (B, ...), where the model was recorded with them.
            skip: Leading inputs to leave out of what is returned.

        Returns:
            The pass.
        """
        differentiable = any(leaf.requires_grad for leaf in pytree.tree_leaves(x))
        uses = [use for block in self.blocks for use in block.uses]
        return self._run(target, theta.detach() if y is None else theta, x, y, uses, differentiable, skip)

    def _run(
        self,
        target: Target,
        theta: Tensor,
        x: data.Tree,
        y: Tensor | None,
        uses: list[Use],
        differentiable: bool,
        skip: int = 0,
    ) -> Pass:
        tape = Tape(self._captured.module, uses, differentiable)
        x = data.map_tree(Tensor.contiguous, x)
        with torch.enable_grad():
            full = target.expand(theta).contiguous()
            out = tape.run(full, *pytree.tree_leaves(x), *([] if y is None else [y.contiguous()]))
            params = dict(zip(self._names, out, strict=False))
            eta = self.family.to_eta(params)
        if not differentiable:
            params = {name: value.detach() for name, value in params.items()}
        return Pass(self.blocks, tape, eta, params, skip, None if y is None else out[-1])

    def _checked(
        self, target: Target, theta: Tensor, x: data.Tree, y: Tensor | None, blocks: list[LayerBlock]
    ) -> tuple[LayerBlock, ...]:
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
        probe = self._run(target, point, x, y, uses, False)
        direction = torch.randn(probe.whole_eta.shape[1], generator=generator, dtype=theta.dtype).to(theta.device)
        cotangent = torch.zeros_like(probe.whole_eta)
        cotangent[datum] = direction
        names = list(probe.tape.outputs)
        values = [point, *(probe.tape.outputs[name] for name in names)]
        found = torch.autograd.grad(probe.whole_eta, values, cotangent, allow_unused=True, retain_graph=y is not None)
        expected = torch.zeros_like(point) if found[0] is None else found[0]
        grads: dict[str, Tensor | None] = dict(zip(names, found[1:], strict=True))
        kept = []
        for block in blocks:
            for candidate in (block, *without_bias(block)):
                laid_out = _laid_out(candidate, grads, datum, size)
                if laid_out is not None and _agrees(probe, laid_out, grads, expected, datum):
                    kept.append(laid_out)
                    break
        if y is not None:
            probe.blocks = tuple(kept)
            layers, whole = probe.slope(point)
            whole = torch.zeros_like(point) if whole is None else whole
            pairs = zip(layers, kept, strict=True)
            self.sloped = all(_close(found, whole[block.positions.to(whole.device)]) for found, block in pairs)
        return tuple(kept)


_TAPS: WeakKeyDictionary[Programs, dict[Any, Taps]] = WeakKeyDictionary()


def taps_for(target: Target, theta: Tensor, x: data.Tree, y: Tensor | None = None) -> Taps:
    """Taps for inputs of this shape, found and checked on first use.

    Args:
        target: The model.
        theta: Where to check them, (P,).
        x: Inputs.
        y: Targets, where the log likelihood is wanted as well.

    Returns:
        The taps.
    """
    cache = _TAPS.setdefault(target.programs, {})
    key = (data.shapes(x), target.kept, theta.device, y is None)
    if key not in cache:
        cache[key] = Taps(target, theta, x, y)
    return cache[key]


class Slope:
    """Log likelihood of the training data and its gradient, collected while a curvature passes over them.

    Args:
        theta: Where, (P,).

    Attributes:
        theta: Where, (P,).
        value: Sum over the data, nats.
    """

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta.detach()
        self.value = 0.0
        self._taps: Taps | None = None  # as all chunks are of one shape, the same for all
        self._layers: list[Tensor] = []
        self._rest = torch.zeros_like(theta, dtype=torch.float64)

    @property
    def gradient(self) -> Tensor | None:
        """Gradient of `value`, (P,), float64; None where no pass was made, or the layers do not give it."""
        if self._taps is None or not self._taps.sloped:
            return None
        total, rest = torch.zeros_like(self._rest), self._taps.rest
        for block, part in zip(self._taps.blocks, self._layers, strict=True):
            total[block.positions] = part
        total[rest] = self._rest[rest]
        return total

    def pass_over(self, target: Target, x: data.Tree, y: Tensor, skip: int) -> tuple[Taps, Pass]:
        """Run the model forward over some of the data, and backward once.

        Args:
            target: The model.
            x: Inputs, (B, ...).
            y: Targets, (B, ...).
            skip: Leading data that were passed over before.

        Returns:
            The taps and the pass, as `passes` yields them.
        """
        taps = taps_for(target, self.theta, x, y)
        theta = self.theta.clone().requires_grad_() if len(taps.rest) else self.theta
        done = taps.run(target, theta, x, y, skip=skip)
        assert done.log_likelihood is not None
        self.value += float(done.log_likelihood.detach().sum(dtype=torch.float64))
        self._taps = taps
        if taps.sloped:
            layers, through = done.slope(theta if len(taps.rest) else None)
            self._layers = [part + before for part, before in zip(layers, self._layers or _zeros(taps), strict=True)]
            self._rest += 0.0 if through is None else through
        return taps, done


def _zeros(taps: Taps) -> list[Tensor]:
    return [torch.zeros(b.positions.shape, dtype=torch.float64, device=b.positions.device) for b in taps.blocks]


def passes(
    target: Target, theta: Tensor, x: data.Tree, size: int, slope: Slope | None = None
) -> Iterator[tuple[slice, Taps, Pass]]:
    """Forward passes over chunks of the inputs, all of one shape: the last chunk is taken full and cut afterwards.

    Args:
        target: The model.
        theta: (P,).
        x: Inputs, every leaf (N, ...).
        size: Largest chunk.
        slope: Where to collect the log likelihood and its gradient, should ``x`` be the training inputs and ``theta``
            the slope's.

    Yields:
        The inputs covered, the taps and the pass.
    """
    total = data.num_data(x)
    size = math.ceil(total / math.ceil(total / size))
    for rows, skip in data.full_chunks(total, size):
        part = data.index(x, rows)
        if slope is None:
            taps = taps_for(target, theta, part)
            done = taps.run(target, theta, part, skip=skip)
        else:
            taps, done = slope.pass_over(target, part, target.y[rows], skip)
        yield slice(rows.start + skip, rows.stop), taps, done


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
        a, g = probe.read(use)[datum], probe.written(use, grads[use.layer.node])[datum]  # (T, in), (T, out)
        if block.kind == "embedding":
            total.index_add_(1, a.reshape(-1), g.mT)
        else:
            total += g.mT @ a
    return _close(total, truth)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether a gradient is the one expected, up to the rounding of its largest entry."""
    scale = expected.abs().max()
    tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-7
    return bool((found - expected).abs().max() <= tolerance * scale) and bool(scale.isfinite())
