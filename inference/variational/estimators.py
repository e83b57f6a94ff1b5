r"""Three unbiased estimates of the expected log-likelihood under independent Gaussians :math:`N(\mu_i, s_i^2)`.

*Reparameterised*: one draw :math:`\theta = \mu + s \epsilon` for the whole batch. *Local*: the pre-activations of a
dense layer are drawn instead of its weights, independently for every datum,

.. math:: z_n \sim N\left(W_\mu a_n + b_\mu,\; W_s^2 a_n^2 + b_s^2\right)

(squares elementwise). *Flipout*: datum n sees the shared perturbation with signs of its own,

.. math:: z_n = W_\mu a_n + \left((s \epsilon)\, (a_n \circ r_n)\right) \circ t_n, \qquad r_n, t_n \in \{-1, 1\}

All three have the same mean and the same variance for one datum; the last two have uncorrelated data, so that the
variance of the gradient falls with the batch size. Layers are found in the recorded graph and rewritten there, so
hand-written models work as modules do. Parameters outside layers (noise scales) are drawn as in the first.

References: Kingma, Salimans & Welling 2015 (local); Wen et al. 2018 (flipout). The layers' cost is that of two forward
passes for both. [recalled from the papers, not re-read]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from inference.data import Tree, index
from inference.layers import Layer, find_layers
from inference.target import Target
from inference.variational.free_energy import Likelihood, mean_over

EstimatorName = Literal["reparameterised", "local", "flipout"]
ESTIMATORS = ("reparameterised", "local", "flipout")


@dataclass(frozen=True)
class Estimator:
    """An estimate of the expected log-likelihood, and the noise it takes.

    Attributes:
        likelihood: Function of means (P,), standard deviations (P,), noise (K, size), x and y to nats, ().
        size: Standard normal numbers per draw.
    """

    likelihood: Likelihood
    size: int


def make_estimator(target: Target, name: EstimatorName, batch_size: int) -> Estimator:
    """Prepare an estimator for batches of one size.

    Args:
        target: The target.
        name: One of :data:`ESTIMATORS`.
        batch_size: Data per step B.

    Returns:
        The estimator.

    Raises:
        ValueError: If the model has a layer that the estimator is wrong for, or none at all.
    """
    if name == "reparameterised":

        def likelihood(loc: Tensor, scale: Tensor, noise: Tensor, x: Tree, y: Tensor) -> Tensor:
            return mean_over(lambda theta: target.log_likelihood(theta, x, y).sum(), loc + scale * noise)

        return Estimator(likelihood, target.dim)
    module = target.recorded(batch_size)
    blocks = _blocks(target, module, name, batch_size)
    rewritten = _Rewritten(target, module, blocks, local=name == "local")
    return Estimator(rewritten.likelihood, target.dim + sum(rewritten.sizes))


class _Block:
    """One layer, with the shapes of its inputs and outputs (B, in, ...) and (B, out, ...)."""

    def __init__(self, layer: Layer, module: fx.GraphModule, batch_size: int) -> None:
        nodes = {n.name: n for n in module.graph.nodes}
        self.layer = layer
        self.inputs = tuple(nodes[layer.input].meta["val"].shape)
        self.outputs = tuple(nodes[layer.node].meta["val"].shape)
        self.batch_size = batch_size

    @property
    def sign_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of flipout's signs: one for each datum and channel, the same at all positions of an image."""
        if self.layer.kind == "conv":
            rest = (1,) * (len(self.inputs) - 2)
            return (*self.inputs[:2], *rest), (*self.outputs[:2], *rest)
        return self.inputs, self.outputs

    @property
    def one_row_per_datum(self) -> bool:
        """Whether the data run along one dimension of the layer's inputs and of its outputs."""
        if self.layer.kind == "conv":
            return self.inputs[0] == self.outputs[0] == self.batch_size
        shapes = [self.inputs, self.outputs if len(self.outputs) == 2 else (*self.outputs, 1)]
        at = -1 if self.layer.flipped else 0
        return all(len(s) == 2 and s[at] == self.batch_size for s in shapes)

    def outputs_at(self, node: fx.Node, inputs: Tensor, theta: Tensor) -> Tensor:
        """The layer's own outputs, bias included."""
        out, bias = self.apply(node, inputs, self.weight(theta) * self.layer.weight_scale), self.bias(theta)
        return out if bias is None else out + bias

    def weight(self, flat: Tensor) -> Tensor:
        """This layer's entries of a full theta-like vector, as its operation reads them."""
        values = flat[self.layer.positions]
        return values.t() if self.layer.flipped and values.dim() == 2 else values

    def bias(self, flat: Tensor) -> Tensor | None:
        """The same for the bias, shaped to be added to the output of the operation."""
        if self.layer.bias_positions is None:
            return None
        values = flat[self.layer.bias_positions] * self.layer.bias_scale
        if self.layer.kind == "conv":
            return values.reshape(-1, *(1,) * (len(self.outputs) - 2))
        return values.reshape(-1, 1) if self.layer.flipped and len(self.outputs) == 2 else values

    def apply(self, node: fx.Node, inputs: Tensor, weight: Tensor) -> Tensor:
        """The operation without its bias, on other inputs and another weight."""
        if self.layer.kind == "conv":
            _, _, _, *rest = node.args
            return torch.ops.aten.convolution.default(inputs, weight, None, *rest)  # type: ignore[arg-type]
        if self.layer.flipped:
            return (weight @ inputs).reshape(self.outputs)
        return (inputs @ weight).reshape(self.outputs)


class _Rewritten:
    """The likelihood with the layers' weights replaced by noise on their outputs."""

    def __init__(self, target: Target, module: fx.GraphModule, blocks: list[_Block], *, local: bool) -> None:
        self.target, self.module, self.local = target, module, local
        self.blocks = {b.layer.node: b for b in blocks}
        inside = torch.zeros(target.full_dim, dtype=torch.bool, device=target.device)
        for block in blocks:
            inside[block.layer.positions] = True
            if block.layer.bias_positions is not None:
                inside[block.layer.bias_positions] = True
        self.inside = inside
        self.sizes = [self._size(b) for b in blocks]

    def _size(self, block: _Block) -> int:
        if self.local:
            return torch.Size(block.outputs).numel()
        return sum(torch.Size(shape).numel() for shape in block.sign_shapes)

    def likelihood(self, loc: Tensor, scale: Tensor, noise: Tensor, x: Tree, y: Tensor) -> Tensor:
        """Mean over the draws of the sum of the log-likelihood over the batch."""
        return mean_over(lambda one: self.per_datum(loc, scale, one, x, y).sum(), noise)

    def per_datum(self, loc: Tensor, scale: Tensor, noise: Tensor, x: Tree, y: Tensor) -> Tensor:
        """Log-likelihood of each datum at one draw of the noise, (B,)."""
        target = self.target
        plain, *parts = noise.split([target.dim, *self.sizes])
        perturbation = _spread(target, scale * plain)
        mean = target.expand(loc)
        theta = torch.where(self.inside, mean, mean + perturbation)
        run = _Layerwise(self, _spread(target, scale), perturbation, dict(zip(self.blocks, parts, strict=True)))
        return run.run(theta, *pytree.tree_leaves(x), y)[1]

    def noise_of(
        self, block: _Block, node: fx.Node, inputs: Tensor, scale: Tensor, perturbation: Tensor, part: Tensor
    ) -> Tensor:
        """What is added to a layer's mean output: shape of the output."""
        if self.local:
            bias = block.bias(scale)
            variance = block.apply(node, inputs.square(), (block.weight(scale) * block.layer.weight_scale).square())
            if bias is not None:
                variance = variance + bias.square()
            # a datum whose inputs are all zero has no variance, and the root no slope there
            return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * part.view(block.outputs)
        before, after = block.sign_shapes
        signs = torch.where(part < 0, -1.0, 1.0).to(part.dtype).split([torch.Size(s).numel() for s in (before, after)])
        return block.outputs_at(node, inputs * signs[0].view(before), perturbation) * signs[1].view(after)


class _Layerwise(fx.Interpreter):
    """Runs the recorded density with noise added to the output of each layer."""

    def __init__(self, rewritten: _Rewritten, scale: Tensor, perturbation: Tensor, parts: dict[str, Tensor]) -> None:
        super().__init__(rewritten.module)
        self.rewritten, self.scale, self.perturbation, self.parts = rewritten, scale, perturbation, parts

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        block = self.rewritten.blocks.get(n.name)
        if block is None:
            return out
        inputs = _read(self, n, block)
        return out + self.rewritten.noise_of(block, n, inputs, self.scale, self.perturbation, self.parts[n.name])


def _spread(target: Target, value: Tensor) -> Tensor:
    """A vector over a restricted theta as one over the full theta, zero for what is fixed."""
    if target.at is None:
        return value
    return replace(target, at=torch.zeros_like(target.at)).expand(value)


def _blocks(target: Target, module: fx.GraphModule, name: EstimatorName, batch_size: int) -> list[_Block]:
    """The layers that the estimator rewrites; embeddings are drawn like parameters outside layers."""
    layers = [layer for layer in find_layers(module, target.all_sites) if layer.kind != "embedding"]
    other = "'reparameterised'" if name == "flipout" else "'flipout' or 'reparameterised'"
    advice = f"use estimator={other}"
    if not layers:
        raise ValueError(f"estimator={name!r} draws noise for linear layers, and the model has none; {advice}")
    blocks = [_Block(layer, module, batch_size) for layer in layers]
    for block in blocks:
        if block.layer.kind == "conv" and name == "local":
            raise ValueError(
                f"estimator='local' needs weights that are used once per datum, but {block.layer.name!r} is a "
                f"convolution: independent noise at every position would be another model; {advice}"
            )
        if not block.one_row_per_datum:
            raise ValueError(
                f"estimator={name!r} needs layers that see one row per datum, but {block.layer.name!r} maps "
                f"{block.inputs} to {block.outputs} for {batch_size} data; {advice}"
            )
    _refuse_shared(target, module, blocks, advice, name)
    return blocks


def _refuse_shared(
    target: Target, module: fx.GraphModule, blocks: list[_Block], advice: str, name: EstimatorName
) -> None:
    """Refuse weights that the likelihood reads anywhere but in one layer: all their gradient must pass through it."""
    theta = 0.3 * torch.randn(target.full_dim, generator=target.stream(0), dtype=target.dtype, device=target.device)
    rows = slice(0, blocks[0].batch_size)
    with torch.enable_grad():
        theta.requires_grad_()
        tape = _Tape(module, {b.layer.node: b for b in blocks})
        leaves = pytree.tree_leaves((index(target.x, rows), target.y[rows]))
        total = tape.run(theta, *leaves)[1].sum()
        whole, *outer = torch.autograd.grad(total, [theta, *tape.outputs.values()], allow_unused=True)
        for block, gradient in zip(tape.outputs_of, outer, strict=True):
            out = block.outputs_at(tape.nodes[block.layer.node], tape.inputs[block.layer.node].detach(), theta)
            through = torch.autograd.grad(out, theta, torch.zeros_like(out) if gradient is None else gradient)[0]
            places = block.layer.positions
            if not torch.allclose(whole[places], through[places], rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
                raise ValueError(
                    f"estimator={name!r} needs weights that are used once per datum, but {block.layer.name!r} is read "
                    f"in more than one place; {advice}"
                )


class _Tape(fx.Interpreter):
    """Runs the recorded density and keeps inputs and outputs of its layers."""

    def __init__(self, module: fx.GraphModule, blocks: dict[str, _Block]) -> None:
        super().__init__(module)
        self.blocks = blocks
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.nodes: dict[str, fx.Node] = {}

    @property
    def outputs_of(self) -> list[_Block]:
        """Layers in the order they ran."""
        return [self.blocks[name] for name in self.outputs]

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self.blocks:
            self.inputs[n.name] = _read(self, n, self.blocks[n.name])
            self.outputs[n.name], self.nodes[n.name] = out, n
        return out


def _read(interpreter: fx.Interpreter, node: fx.Node, block: _Block) -> Tensor:
    """What a layer reads, while its operation runs."""
    return interpreter.env[next(a for a in node.all_input_nodes if a.name == block.layer.input)]
