r"""A network linearised at a point, as a linear model that is known only by its products.

.. math:: \eta_{lin}(x, \theta) = \eta(x, \theta^*) + J(x)(\theta - \theta^*), \qquad
          H = \sum_n J_n^\top \Lambda_n J_n

J v is one forward-mode and :math:`J^\top u` one reverse-mode pass, for k vectors together: what depends on
:math:`\theta^*` alone is computed once for all of them. The data pass in chunks of bounded size, so that memory is
that of a few sets of k vectors; neither J nor H is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from inference.chunking import even
from inference.data import Tree, chunks, index, num_data, shapes
from inference.graph import CompileOption, hot
from inference.kronecker import score
from inference.mixtures import Params
from inference.observation import LikelihoodFamily
from inference.taps import activation_sizes
from inference.target import Target

_CHUNK_BYTES = 256 * 2**20
# What recording keeps for each vector, in activations of a forward pass: 213 MB a datum, for 16 and a ResNet-20.
_ALIVE = 3


class LinearModel:
    """Products with the Jacobian and the Gauss-Newton matrix of a linearised network.

    Args:
        target: The model; its likelihood temperature divides the curvature and the score.
        center: Linearisation point, (P,).
        num: Number of vectors k that advance together, which bounds the chunks.
        x: Inputs, every leaf (N, ...); the training inputs by default.
        compile: See :func:`inference.graph.hot`.
        num_calls: Expected number of products with H.
        chunk_bytes: Bound on the activations held at once.

    Attributes:
        params: Parameters of the observed distribution at the center, each (N, ...).
        eta: The same in the coordinates of the linearisation, (N, E).
    """

    def __init__(
        self,
        target: Target,
        center: Tensor,
        num: int,
        *,
        x: Tree | None = None,
        compile: CompileOption = False,
        num_calls: float = 0,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        self.target, self.center = target, center.detach().contiguous()
        self.x = target.x if x is None else x
        self.num_data = num_data(self.x)
        limit = self.num_data if x is None or target.programs.traced.local_sites else MAX_PREDICTED
        self.rows = even(self.num_data, min(self.num_data, limit, rows_together(target, num, chunk_bytes)))
        self._compile: CompileOption = compile
        self._num_calls = num_calls
        self._programs: dict[Any, Callable[..., Tensor]] = {}
        parts = [self.parameters(rows) for rows in chunks(self.num_data, self.rows)]
        self.params: Params = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.family: LikelihoodFamily = target.family(index(self.x, slice(0, self.rows)))
        self.eta = self.family.to_eta(self.params)

    # -- the likelihood at values of eta ---------------------------------------------------------------------------

    def parameters(self, rows: slice) -> Params:
        """Parameters of the observed distribution at the center, each (n, ...)."""
        with torch.no_grad():
            return self.target.parameters(self.center, index(self.x, rows))

    def params_at(self, eta: Tensor) -> Params:
        """Parameters of the observed distribution at other values of eta, (N, E) to (N, ...) each."""
        return self.family.from_eta(eta, self.params)

    def log_likelihood(self, eta: Tensor) -> float:
        """Tempered log-likelihood of the training data in nats, total, at values of eta (N, E)."""
        log_prob = self.family.distribution(self.params_at(eta)).log_prob(self.target.y)
        return float(log_prob.double().sum()) / self.target.likelihood_temperature

    def score(self, eta: Tensor) -> Tensor:
        r"""Gradient of the tempered log-likelihood in theta, :math:`J^\top \nabla_\eta \log p(y \mid \eta)`, (P,)."""
        gradient = score(self.family, eta, self.params, self.target.y) / self.target.likelihood_temperature
        return self.pull(gradient[None])[0]

    # -- products ------------------------------------------------------------------------------------------------------

    def push(self, vectors: Tensor, rows: slice | None = None) -> Tensor:
        """Function values J v.

        Args:
            vectors: (k, P).
            rows: Some of the inputs; all by default.

        Returns:
            (k, N, E).
        """
        pieces = [rows] if rows is not None else list(chunks(self.num_data, self.rows))
        found = []
        with torch.no_grad():
            for piece in pieces:
                x = index(self.x, piece)
                found.append(self._program("push", _push, vectors, x)(self.center, vectors, x))
        return torch.cat(found, 1)

    def pull(self, cotangents: Tensor) -> Tensor:
        r"""Gradients :math:`\sum_n J_n^\top u_n`.

        Args:
            cotangents: u, (k, N, E).

        Returns:
            (k, P).
        """
        total = cotangents.new_zeros(len(cotangents), self.target.dim)
        for rows in chunks(self.num_data, self.rows):
            total += self._pull_chunk(cotangents[:, rows].contiguous(), rows)
        return total

    def pull_noise(self, num: int, generator: torch.Generator) -> Tensor:
        r"""Draws of :math:`J^\top u` with :math:`u_n \sim N(0, \Lambda_n)`: their covariance is H.

        Args:
            num: Number of draws k.
            generator: Source of the randomness.

        Returns:
            (k, P).
        """
        total = self.center.new_zeros(num, self.target.dim)
        for rows in chunks(self.num_data, self.rows):
            root = self.family.fisher_root(index(self.params, rows)) / self.target.likelihood_temperature**0.5
            noise = torch.randn(
                num, *root.shape[:1], root.shape[2], 1, generator=generator, dtype=root.dtype, device=root.device
            )
            total += self._pull_chunk((root @ noise).squeeze(-1), rows)
        return total

    def gram(self, vectors: Tensor, params: Params | None = None, rows: Tensor | None = None) -> Tensor:
        r"""Products :math:`H v`, or their estimates from a minibatch, scaled by N / B.

        Args:
            vectors: (k, P).
            params: Where the curvature of the likelihood is taken, each (N, ...); at the center by default.
            rows: Numbers of the data of a minibatch, (B,); all data by default.

        Returns:
            (k, P).
        """
        params = self.params if params is None else params
        scale = 1 / self.target.likelihood_temperature
        pieces: Any = list(chunks(self.num_data, self.rows))
        if rows is not None:
            scale = scale * self.num_data / len(rows)
            pieces = rows.split(even(len(rows), min(len(rows), self.rows)))
        total = torch.zeros_like(vectors)
        with torch.no_grad():
            for piece in pieces:
                x, at = index(self.x, piece), index(params, piece)
                total += self._program("gram", _gram, vectors, x, at)(self.center, vectors, x, at)
        return total.mul_(scale)

    def _pull_chunk(self, cotangents: Tensor, rows: slice) -> Tensor:
        x = index(self.x, rows)
        with torch.no_grad():
            return self._program("pull", _pull, cotangents, x)(self.center, cotangents, x)

    def _program(self, kind: str, fn: Callable[..., Tensor], *example: Any) -> Callable[..., Tensor]:
        key = (kind, shapes(example))
        if key not in self._programs:
            x = example[1]
            family = self.target.family(x)  # recorded outside
            compile = self._compile if kind == "gram" else False
            calls = self._num_calls * self.num_data / num_data(x)
            self._programs[key] = hot(
                lambda *args: fn(self.target, family, *args), self.center, *example, compile=compile, num_calls=calls
            )
        return self._programs[key]


MAX_PREDICTED = 256
"""Inputs whose predictions are linearised together."""


def rows_together(target: Target, num: int, chunk_bytes: int = _CHUNK_BYTES) -> int:
    """Number of data whose activations, for k vectors, stay within a bound.

    Args:
        target: The model.
        num: Number of vectors k.
        chunk_bytes: The bound.

    Returns:
        At least 1; all data for a model that runs on all of its data or not at all.
    """
    total = target.num_data
    if target.programs.traced.local_sites:
        return total
    sizes, rows = activation_sizes(target)
    floats = max(1.0, sum(sizes.values()) * (1 + _ALIVE * num) / rows)
    return max(1, min(total, int(chunk_bytes / (floats * target.dtype.itemsize))))


def _push(target: Target, family: LikelihoodFamily, theta: Tensor, vectors: Tensor, x: Tree) -> Tensor:
    return vmap(lambda v: jvp(lambda t: target.eta(t, x), (theta,), (v,))[1])(vectors)


def _pull(target: Target, family: LikelihoodFamily, theta: Tensor, cotangents: Tensor, x: Tree) -> Tensor:
    pullback = vjp(lambda t: target.eta(t, x), theta)[1]
    return vmap(lambda u: pullback(u)[0])(cotangents)


def _gram(target: Target, family: LikelihoodFamily, theta: Tensor, vectors: Tensor, x: Tree, params: Params) -> Tensor:
    fisher = family.fisher(params)
    pullback = vjp(lambda t: target.eta(t, x), theta)[1]

    def one(vector: Tensor) -> Tensor:
        pushed = jvp(lambda t: target.eta(t, x), (theta,), (vector,))[1]
        return pullback((fisher @ pushed.unsqueeze(-1)).squeeze(-1))[0]

    return vmap(one)(vectors)
