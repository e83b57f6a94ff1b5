"""One pass through a recorded model: what its layers read and wrote, and the backward passes from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inference.layer_blocks import LayerBlock, Use, by_datum, leading_rows, rows_read


class Pass:
    """Activations of one forward pass, and the backward passes through it.

    Args:
        blocks: The layers that are tapped.
        tape: What ran.
        eta: Of all data that ran, (B, E).
        params: Likewise, each (B, ...).
        skip: Leading data to leave out of everything here.
        log_likelihood: Where targets were given, the log likelihood of all data that ran, (B,).

    Attributes:
        blocks: The layers that are tapped.
        tape: What ran.
        whole_eta: Unconstrained likelihood parameters of all data that ran, to differentiate, (B, E).
        eta: Those of the data not left out, (n, E).
        params: Parameters of the observed distribution, each (n, ...).
        log_likelihood: Log likelihood of each datum, (n,) nats, where targets were given.
    """

    def __init__(
        self,
        blocks: tuple[LayerBlock, ...],
        tape: Tape,
        eta: Tensor,
        params: dict[str, Tensor],
        skip: int,
        log_likelihood: Tensor | None = None,
    ) -> None:
        self.blocks, self.tape, self.whole_eta, self._skip = blocks, tape, eta, skip
        self._inputs: dict[LayerBlock, Tensor] = {}
        self.eta = eta[skip:] if tape.differentiable else eta[skip:].detach()
        self.params = {name: value[skip:] for name, value in params.items()}
        self.log_likelihood = None if log_likelihood is None else log_likelihood[skip:]

    def inputs(self, block: LayerBlock) -> Tensor:
        """What a layer read.

        Args:
            block: The layer.

        Returns:
            (n, T, in), or the token ids (n, T) of an embedding.
        """
        if block not in self._inputs:
            self._inputs[block] = _joined([self.read(use)[self._skip :] for use in block.uses])
        return self._inputs[block]

    def gradients(self, cotangent: Tensor) -> list[Tensor]:
        r"""Gradients of :math:`\sum_{ne} c_{ne} \eta_{ne}` with respect to the pre-activations.

        Args:
            cotangent: c, (n, E).

        Returns:
            For every block, (n, T, out).
        """
        if self._skip:
            cotangent = torch.cat([cotangent.new_zeros(self._skip, cotangent.shape[1]), cotangent])
        return self._gradients(self.whole_eta, cotangent)[0]

    def slope(self, theta: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Gradient of the log likelihood summed over the data.

        Args:
            theta: Where the pass ran, if the gradient outside the layers is wanted too.

        Returns:
            For every layer, (out, in), and with respect to ``theta``, through the layers or past them, (P,).
        """
        assert self.log_likelihood is not None
        found, other = self._gradients(self.log_likelihood.sum(), None, theta)
        layers = []
        for block, gradients in zip(self.blocks, found, strict=True):
            inputs = self.inputs(block)
            if block.kind == "embedding":
                total = gradients.new_zeros(block.positions.shape)
                layers.append(total.index_add_(1, inputs.flatten(), gradients.flatten(0, 1).mT))
            else:
                columns = (part.permute(2, 0, 1).flatten(1) for part in (gradients, inputs))
                layers.append(next(columns) @ next(columns).mT)
        return layers, other

    def _gradients(
        self, of: Tensor, cotangent: Tensor | None, theta: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """With respect to the pre-activations of every block, and to theta where it is given."""
        tape = self.tape
        names = list(tape.outputs)
        values = [*(tape.outputs[name] for name in names), *([] if theta is None else [theta])]
        if not values:
            return [], None
        found = torch.autograd.grad(
            of, values, cotangent, retain_graph=True, create_graph=tape.differentiable, allow_unused=True
        )
        grads = dict(zip(names, found, strict=False))
        places = [
            _joined([self.written(use, grads[use.layer.node])[self._skip :] for use in block.uses])
            for block in self.blocks
        ]
        return places, None if theta is None else found[-1]

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
        found = [self.gradients(column) for column in columns.unbind(-1)] if self.blocks else []
        return [_stacked(parts) for parts in zip(*found, strict=True)]

    def read(self, use: Use) -> Tensor:
        """What one use of a weight read for all data that ran, (B, T, in), or tokens (B, T)."""
        value, size = self.tape.inputs[use.layer.input], self.whole_eta.shape[0]
        if use.layer.kind == "embedding":
            return by_datum(value.reshape(-1, 1), use.after, size)
        return by_datum(rows_read(value, use), use.after, size)

    def written(self, use: Use, grad: Tensor | None) -> Tensor:
        """The gradient of what one use of a weight wrote, by datum and place, (B, T, out)."""
        value, size = self.tape.outputs[use.layer.node], self.whole_eta.shape[0]
        grad = grad if grad is not None else torch.zeros_like(value)
        if use.layer.kind == "embedding":
            tokens = self.tape.inputs[use.layer.input]
            grad = grad * use.layer.weight_scale
            if use.padding >= 0:
                grad = grad.masked_fill((tokens == use.padding).unsqueeze(-1), 0.0)
        rows = leading_rows(grad, use)
        if use.layer.kind == "conv":
            rows = grad.flatten(2).mT.chunk(use.groups, -1)[use.group]
        else:
            rows = rows.unsqueeze(1)
        return by_datum(rows, use.after, size)


def _joined(parts: list[Tensor]) -> Tensor:
    """Places of all uses of a weight, (n, T, width); of a single one, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """Several (n, T, width) as one (n, C, T, width), copied in the order that they have in memory."""
    if parts[0].stride(-1) == 1:
        return torch.stack(parts, 1)
    return torch.stack([part.mT for part in parts], 1).mT


class Tape(fx.Interpreter):
    """Runs a graph and keeps what layers read and write.

    Args:
        module: The graph.
        uses: Operations whose inputs and outputs are kept.
        differentiable: Whether gradients with respect to the graph's inputs are wanted.
    """

    def __init__(self, module: fx.GraphModule, uses: list[Use], differentiable: bool) -> None:
        super().__init__(module)
        self.differentiable = differentiable
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._read = {use.layer.input for use in uses}
        self._written = {use.layer.node for use in uses}

    def run_node(self, n: fx.Node) -> Any:  # noqa: D102
        result = super().run_node(n)
        if n.name in self._read:
            self.inputs[n.name] = result if self.differentiable else result.detach()
        if n.name in self._written:
            if not result.requires_grad:
                result.requires_grad_()
            self.outputs[n.name] = result
        return result
