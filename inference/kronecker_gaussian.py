r"""A Gaussian with one Kronecker-factored block per layer; what is no layer is a block with a single column.

A block holds the entries of theta at ``positions`` (out, in) as a matrix W with

.. math:: W = M + U_o (\sqrt{S} \odot \Xi) U_i^\top, \quad U_o = \mathrm{diag}(s_o) Q_o, \quad
          U_i = \mathrm{diag}(s_i) Q_i, \quad \Xi_{jk} \sim N(0, 1)

with orthogonal Q and variances S in the eigenbasis, so that draws, densities and function variances are products of
small matrices. A layer's Jacobian :math:`\sum_t g_t a_t^\top` is contracted from its inputs a and output gradients g:

.. math:: \mathrm{Cov}(f_k, f_l) = \sum_{ij} S_{ij}\,(U_o^\top g_k)_i (U_o^\top g_l)_i\,(U_i^\top a)_j^2
          \quad \text{where a weight is used once.}
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from inference.flat_gaussian import LOG_2PI, FlatGaussian, noise, require_finite, require_positive, require_shape


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """Covariance of the entries of theta that form one matrix, independent of all others.

    Attributes:
        positions: Index into theta, (out, in).
        variance: Variances S in the eigenbasis, all > 0, (out, in).
        out_vectors: Orthogonal matrix of the outputs, (out, out); None for the identity.
        in_vectors: Orthogonal matrix of the inputs, (in, in); None for the identity.
        out_scale: Scale of each output, > 0, (out,); None for ones.
        in_scale: Scale of each input, > 0, (in,); None for ones.
    """

    positions: Tensor
    variance: Tensor
    out_vectors: Tensor | None = None
    in_vectors: Tensor | None = None
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and signs.

        Raises:
            ValueError: If `positions` is no matrix, or a field does not fit it.
        """
        if self.positions.dim() != 2:
            raise ValueError(f"positions must have shape (out, in), got {tuple(self.positions.shape)}")
        require_shape("variance", self.variance, self.positions.shape, "out, in")
        require_positive("variance", self.variance.flatten())
        object.__setattr__(self, "variance", self.variance.contiguous())
        object.__setattr__(self, "positions", self.positions.contiguous())
        for side, size in zip(("out", "in"), self.positions.shape, strict=True):
            vectors, scale = getattr(self, f"{side}_vectors"), getattr(self, f"{side}_scale")
            if vectors is not None:
                # LAPACK lays vectors out by columns; as when loaded from a file, draws are equal to the bit.
                object.__setattr__(self, f"{side}_vectors", vectors.contiguous())
                require_shape(f"{side}_vectors", vectors, torch.Size([size, size]), f"{side}, {side}")
                require_finite(f"{side}_vectors", vectors)
            if scale is not None:
                require_shape(f"{side}_scale", scale, torch.Size([size]), side)
                require_positive(f"{side}_scale", scale)

    def rotated_out(self, value: Tensor) -> Tensor:
        """Rows times U_o: (..., out) to (..., out)."""
        return _times(value, self.out_scale, self.out_vectors)

    def rotated_in(self, value: Tensor) -> Tensor:
        """Rows times U_i: (..., in) to (..., in)."""
        return _times(value, self.in_scale, self.in_vectors)

    def spread(self, value: Tensor) -> Tensor:
        """From the eigenbasis to theta's: U_o X U_i^T, (..., out, in)."""
        value = _times_transposed(value, self.in_scale, self.in_vectors)
        return _times_transposed(value.mT, self.out_scale, self.out_vectors).mT

    def whitened(self, value: Tensor) -> Tensor:
        """Undo `spread` and divide by the standard deviations: independent N(0, 1) for draws, (..., out, in)."""
        value = value if self.in_scale is None else value / self.in_scale
        value = value if self.out_scale is None else value / self.out_scale[:, None]
        value = value if self.in_vectors is None else value @ self.in_vectors
        value = value if self.out_vectors is None else self.out_vectors.mT @ value
        return value / self.variance.sqrt()

    def half_logdet(self) -> Tensor:
        """Half the log determinant of the covariance, ()."""
        out, columns = self.positions.shape
        total = 0.5 * self.variance.log().sum()
        total = total if self.out_scale is None else total + columns * self.out_scale.log().sum()
        return total if self.in_scale is None else total + out * self.in_scale.log().sum()

    def marginals(self) -> Tensor:
        """Marginal variance of every entry, (out, in)."""
        rows = self.variance if self.out_vectors is None else self.out_vectors.square() @ self.variance
        rows = rows if self.in_vectors is None else rows @ self.in_vectors.square().mT
        rows = rows if self.out_scale is None else rows * self.out_scale.square()[:, None]
        return rows if self.in_scale is None else rows * self.in_scale.square()

    def roots(self, jacobian: Tensor) -> Tensor:
        r"""J times a root of the block's covariance, flattened, so that its Gram matrix is :math:`J \Sigma J^\top`.

        Args:
            jacobian: Derivatives with respect to W, (..., out, in).

        Returns:
            (..., out * in).
        """
        rotated = self.rotated_out(self.rotated_in(jacobian).mT).mT
        return (rotated * self.variance.sqrt()).flatten(-2)

    def function_covariance(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        r"""The block's part of :math:`J \Sigma J^\top` for each datum, without J where a weight is used once.

        Args:
            inputs: a, (n, T, in), or token ids (n, T).
            gradients: g of each output, (n, E, T, out).

        Returns:
            (n, E, E).
        """
        if not inputs.is_floating_point():
            rows = self._token_roots(inputs, gradients)  # (n, E, T, out)
            same = (inputs.unsqueeze(-1) == inputs.unsqueeze(-2)).to(rows).unsqueeze(1)  # (n, 1, T, T)
            return rows.flatten(2) @ (same @ rows).flatten(2).mT
        if inputs.shape[1] > 1:
            rows = self._layer_roots(inputs, gradients)
            return rows @ rows.mT
        weights = self.rotated_in(inputs[:, 0]).square() @ self.variance.mT  # (n, out)
        once = self.rotated_out(gradients[:, :, 0])
        return (once * weights.unsqueeze(1)) @ once.mT

    def joint_covariance(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """As `function_covariance`, with the covariance between data.

        Args:
            inputs: a, (n, T, in), or token ids (n, T).
            gradients: g of each output, (n, E, T, out).

        Returns:
            (n, E, n, E).
        """
        num, outputs = gradients.shape[:2]
        if not inputs.is_floating_point():
            inputs = functional.one_hot(inputs, self.positions.shape[1]).to(gradients)
        if inputs.shape[1] > 1:
            rows = self._layer_roots(inputs, gradients).flatten(0, 1)
            return (rows @ rows.mT).reshape(num, outputs, num, outputs)
        inputs, gradients = self.rotated_in(inputs[:, 0]), self.rotated_out(gradients[:, :, 0])
        rows = []
        for a, g in zip(inputs, gradients, strict=True):
            weights = (inputs * a) @ self.variance.mT  # (n, out)
            rows.append(torch.einsum("ko,clo->kcl", g, gradients * weights.unsqueeze(1)))
        return torch.stack(rows)

    def _layer_roots(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """`roots` of a layer, from (n, T, in) and (n, E, T, out): rotated before or after the sum over its places."""
        outputs, places, out = gradients.shape[1:]
        width = inputs.shape[2]
        if outputs * out * width * (out + width) < places * (width**2 + outputs * out**2):
            return self.roots(layer_jacobian(inputs, gradients))
        jacobian = layer_jacobian(self.rotated_in(inputs), self.rotated_out(gradients))
        return (jacobian * self.variance.sqrt()).flatten(2)

    def _token_roots(self, tokens: Tensor, gradients: Tensor) -> Tensor:
        columns = self.variance.sqrt().mT  # (in, out)
        columns = columns if self.in_scale is None else columns * self.in_scale[:, None]
        return self.rotated_out(gradients) * columns[tokens].unsqueeze(1)


def layer_jacobian(inputs: Tensor, gradients: Tensor) -> Tensor:
    r"""Jacobian of a layer, :math:`\sum_t g_{nt} a_{nt}^\top` for each output.

    Args:
        inputs: a, (n, T, in).
        gradients: g of each output, (n, E, T, out).

    Returns:
        (n, E, out, in).
    """
    # One product per datum: broadcasting over the outputs would copy the inputs for each of them.
    return (gradients.mT.flatten(1, 2) @ inputs).unflatten(1, (gradients.shape[1], -1))


@dataclass(frozen=True, eq=False)
class KroneckerGaussian(FlatGaussian):
    """Independent blocks, each with a Kronecker-factored eigenbasis.

    Attributes:
        loc: Mean, shape (P,).
        blocks: The blocks; together they hold every entry of theta once.
    """

    blocks: tuple[KroneckerBlock, ...] = ()

    def __post_init__(self) -> None:
        """Check that every entry of theta is in exactly one block.

        Raises:
            ValueError: If the blocks overlap or leave something out.
        """
        super().__post_init__()
        positions = [block.positions.flatten() for block in self.blocks]
        held = torch.cat(positions).sort().values if positions else self.loc.new_zeros(0, dtype=torch.long)
        if held.shape != self.loc.shape or not torch.equal(held, torch.arange(self.dim, device=held.device)):
            raise ValueError(
                f"the blocks must hold each of the {self.dim} entries of theta once, got {len(held)} entries"
            )

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        drawn = noise(self.loc, num_samples, self.dim, generator)
        out = torch.empty_like(drawn)
        for block in self.blocks:
            out[:, block.positions] = block.spread(drawn[:, block.positions] * block.variance.sqrt())
        return self.loc + out

    def log_prob(self, theta: Tensor) -> Tensor:  # noqa: D102
        centred = theta - self.loc
        zero = centred.new_zeros(())
        distances = (block.whitened(centred[..., block.positions]).square().sum((-2, -1)) for block in self.blocks)
        distance = sum(distances, start=zero)
        half_logdet = sum((block.half_logdet() for block in self.blocks), start=zero)
        return -0.5 * (distance + self.dim * LOG_2PI) - half_logdet

    @property
    def variance(self) -> Tensor:  # noqa: D102
        out = torch.empty_like(self.loc)
        for block in self.blocks:
            out[block.positions] = block.marginals()
        return out

    def covariance(self) -> Tensor:  # noqa: D102
        out = self.loc.new_zeros(self.dim, self.dim)
        for block in self.blocks:
            flat = block.positions.flatten()
            unit = torch.eye(len(flat), dtype=out.dtype, device=out.device).reshape(-1, *block.positions.shape)
            rows = block.roots(unit)
            out[flat[:, None], flat] = rows @ rows.mT
        return out

    def quadratic(self, jacobian: Tensor) -> Tensor:  # noqa: D102
        parts = [block.roots(jacobian[..., block.positions]) for block in self.blocks]
        return sum((rows @ rows.mT for rows in parts), start=jacobian.new_zeros(()))

    def covariance_times(self, vector: Tensor) -> Tensor:  # noqa: D102
        out = torch.empty_like(vector)
        for block in self.blocks:
            piece = vector[..., block.positions]
            rotated = block.rotated_out(block.rotated_in(piece).mT).mT
            out[..., block.positions] = block.spread(rotated * block.variance)
        return out

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        held = {"loc": self.loc}
        for i, block in enumerate(self.blocks):
            values = {f.name: getattr(block, f.name) for f in fields(block)}
            held |= {f"blocks.{i}.{name}": value for name, value in values.items() if value is not None}
        return held

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:  # noqa: D102
        return cls(tensors["loc"], tuple(_blocks(tensors)))


def _blocks(tensors: Mapping[str, Tensor]) -> Iterable[KroneckerBlock]:
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    for number in sorted(numbers):
        prefix = f"blocks.{number}."
        yield KroneckerBlock(**{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def _times(value: Tensor, scale: Tensor | None, vectors: Tensor | None) -> Tensor:
    value = value if scale is None else value * scale
    return value if vectors is None else value @ vectors


def _times_transposed(value: Tensor, scale: Tensor | None, vectors: Tensor | None) -> Tensor:
    value = value if vectors is None else value @ vectors.mT
    return value if scale is None else value * scale
