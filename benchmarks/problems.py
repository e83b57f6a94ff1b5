"""The problems: data, our model, and the same model by hand in plain Pyro and in plain torch.

The peers get models written for them, without the checks and the generality of `bnn_models.MLP`: matrix products inside
`pyro.sample` statements for Pyro, slices of a flat vector for torch. All have the parameters in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.data import available, load
from inference import Target, compile_target

NOISE = 0.1  # standard deviation of the standardised target


@dataclass(frozen=True)
class Problem:
    """A network on data.

    Attributes:
        sizes: Layer widths [D, H1, ..., K].
        x: Inputs, (N, D).
        y: Targets, (N,).
        classes: Whether targets are labels.
        fan_in: Prior standard deviations 1/sqrt(fan-in) for weights (1 for biases); else N(0, 1) throughout.
    """

    sizes: tuple[int, ...]
    x: Tensor
    y: Tensor
    classes: bool = False
    fan_in: bool = True

    @property
    def name(self) -> str:
        """Like 8-50-1 tanh."""
        return "-".join(map(str, self.sizes)) + (" relu" if self.classes else " tanh")

    @property
    def dim(self) -> int:
        """Number of parameters P."""
        return sum(math.prod(shape) for _, shape in self.sites)

    @property
    def sites(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the parameters in the order of theta."""
        found: list[tuple[str, tuple[int, ...]]] = []
        for i, (a, b) in enumerate(pairwise(self.sizes)):
            found += [(f"layers.{i}.weight", (b, a)), (f"layers.{i}.bias", (b,))]
        return found

    def prior_scale(self, shape: Sequence[int]) -> float:
        """Prior standard deviation of a site of this shape."""
        return shape[1] ** -0.5 if self.fan_in and len(shape) == 2 else 1.0

    def ours(self) -> MLP:
        """The model as a user of bnn-zoo declares it."""
        likelihood = likelihoods.Categorical(self.sizes[-1]) if self.classes else likelihoods.Normal(NOISE)
        prior = priors.Normal(scale="fan_in") if self.fan_in else priors.Normal()
        return MLP(self.sizes, activation="relu" if self.classes else "tanh", prior=prior, likelihood=likelihood)

    def target(self) -> Target:
        """Our model with the data."""
        return compile_target(self.ours(), self.x, self.y)

    def network(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """Outputs (N, K), or (N,) for a regression, at weights W1, b1, W2, b2, ..."""
        h = x
        for i in range(0, len(weights), 2):
            h = torch.nn.functional.linear(h, weights[i], weights[i + 1])
            if i < len(weights) - 2:
                h = h.relu() if self.classes else h.tanh()
        return h if self.classes else h.squeeze(-1)

    def pyro_model(self, num_data: int | None = None) -> Callable[..., Tensor]:
        """The model by hand in Pyro; with `num_data`, a minibatch stands for that many data."""
        shapes = [(name, shape, self.prior_scale(shape)) for name, shape in self.sites]

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            weights = [
                pyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))
                for name, shape, scale in shapes
            ]
            f = self.network(weights, x)
            observed = dist.Categorical(logits=f) if self.classes else dist.Normal(f, NOISE)
            if num_data is None:
                plate = pyro.plate("data", len(x))
            else:
                plate = pyro.plate("data", num_data, subsample=torch.arange(len(x)))
            with plate:
                pyro.sample("y", observed, obs=y)
            return f

        return model

    def by_hand(self) -> Callable[[Tensor], Tensor]:
        """Log density of a flat theta in plain torch, up to a constant: what one writes without a library."""
        sizes = [math.prod(shape) for _, shape in self.sites]
        shapes = [shape for _, shape in self.sites]
        precision = torch.cat([torch.full((n,), self.prior_scale(s) ** -2) for n, s in zip(sizes, shapes, strict=True)])

        def log_density(theta: Tensor) -> Tensor:
            weights = [part.view(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True)]
            residual = self.y - self.network(weights, self.x)
            return -0.5 * (precision * theta * theta).sum() - (0.5 / NOISE**2) * residual.square().sum()

        return log_density

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """Site values of theta, (..., P) to (..., *shape) by name."""
        parts = theta.split([math.prod(shape) for _, shape in self.sites], -1)
        return {n: p.reshape(*theta.shape[:-1], *s) for (n, s), p in zip(self.sites, parts, strict=True)}


def energy(hidden: Sequence[int] = (50,), fan_in: bool = True) -> Problem:
    """UCI energy, split 0: N = 691, D = 8; bundled."""
    data = load("energy")
    return Problem((data.num_features, *hidden, 1), data.x_train, data.y_train, fan_in=fan_in)


def mnist(hidden: Sequence[int], num: int) -> Problem | None:
    """The first images of MNIST, if they are in the cache already."""
    if next(d.where for d in available() if d.name == "mnist") != "cache":
        return None
    data = load("mnist")
    return Problem((784, *hidden, 10), data.x_train[:num], data.y_train[:num], classes=True)


def random_images(hidden: Sequence[int], num: int, fan_in: bool = True) -> Problem:
    """Gaussian inputs of the size of MNIST with random labels, where the values do not matter to the speed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 784, generator=generator)
    y = torch.randint(10, (num,), generator=generator)
    return Problem((784, *hidden, 10), x, y, classes=True, fan_in=fan_in)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    return float((found - expected).double().norm() / expected.double().norm())
