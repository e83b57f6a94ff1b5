"""The models every backend is put through: small, fast, and one for each way of writing a Pyro model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

N, D, H = 12, 3, 2


@dataclass(frozen=True)
class Case:
    """One model with data.

    Attributes:
        name: Identifies the case in test names.
        factory: Makes the model from a seed (which fixes untrained constants, where there are any).
        x: Inputs, float64 where floating.
        y: Targets.
        task: regression, classification or count.
        broadcasts: Whether extra dimensions on the left of every site pass through (Pyro's vectorised plates).
        local: Whether there are latents per datum, which minibatches and new inputs refuse.
    """

    name: str
    factory: Callable[[int], Callable[..., Any]]
    x: Any
    y: Tensor
    task: str = "regression"
    broadcasts: bool = False
    local: bool = False

    def model(self, seed: int = 0) -> Callable[..., Any]:
        """A fresh model."""
        return self.factory(seed)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.randn(N, D, generator=_generator(1), dtype=torch.float64)
Y = torch.sin(X.sum(-1)) + 0.1 * torch.randn(N, generator=_generator(2), dtype=torch.float64)
LABELS = torch.arange(N) % 3
TOKENS = torch.arange(2 * N).reshape(N, 2) % 5
IMAGES = torch.randn(N, 1, 4, 4, generator=_generator(3), dtype=torch.float64)


def normal(*shape: int, scale: float = 1.0) -> Any:
    """Independent normal prior over one site of this shape."""
    return dist.Normal(0.0, scale).expand(list(shape)).to_event(len(shape))


def tanh_network(num_inputs: int, hidden: int, noise: float | None = None) -> Callable[..., None]:
    """One hidden layer without biases, weights N(0, 1); the noise sd is given, or has a HalfNormal(1) prior."""

    def network(x: Tensor, y: Tensor | None = None) -> None:
        w0 = pyro.sample("w0", normal(num_inputs, hidden))
        w1 = pyro.sample("w1", normal(hidden))
        scale = pyro.sample("noise", dist.HalfNormal(1.0)) if noise is None else noise
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w0) @ w1, scale), obs=y)

    return network


def observe(loc: Tensor, scale: Any, y: Tensor | None) -> None:
    """Normal likelihood inside the data plate, at any extra dimensions on the left."""
    with pyro.plate("data", loc.shape[-1]):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


class PyroNet(PyroModule):
    """``PyroModule[nn.Linear]`` layers with ``PyroSample`` weights and one learnt noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PyroModule[nn.Linear](D, H)
        self.last = PyroModule[nn.Linear](H, 1)
        for layer in (self.first, self.last):
            layer.weight = PyroSample(normal(*layer.weight.shape))
            layer.bias = PyroSample(normal(*layer.bias.shape))
        self.noise = PyroSample(dist.LogNormal(-1.0, 0.5))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.last(torch.tanh(self.first(x))).squeeze(-1)
        observe(mean, self.noise, y)
        return mean


class FrozenFeatures(PyroModule):
    """A first layer of plain parameters and a buffer, both without a prior: constants."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.features = nn.Linear(D, H, dtype=torch.float64)
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("centre", torch.full((D,), 0.1, dtype=torch.float64))
        with torch.no_grad():
            for parameter in self.features.parameters():
                parameter.normal_(generator=_generator(seed))
        self.last = PyroModule[nn.Linear](H, 1)
        self.last.weight = PyroSample(normal(1, H))
        self.last.bias = PyroSample(normal(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.features(x - self.centre) + self.shift)
        mean = self.last(hidden).squeeze(-1)
        observe(mean, 0.3, y)
        return mean


class ConvNet(PyroModule):
    """A convolution and a linear layer over 4 x 4 images, three classes; with a dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = PyroModule[nn.Conv2d](1, 2, 2)
        self.conv.weight = PyroSample(normal(2, 1, 2, 2))
        self.conv.bias = PyroSample(normal(2))
        self.last = PyroModule[nn.Linear](18, 3)
        self.last.weight = PyroSample(normal(3, 18, scale=0.3))
        self.last.bias = PyroSample(normal(3))
        self.drop = nn.Dropout(0.5)
        self.eval()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.last(self.drop(torch.relu(self.conv(x)).flatten(1)))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


def by_hand(x: Tensor, y: Tensor | None = None) -> None:
    w1 = pyro.sample("w1", normal(D, H))
    b1 = pyro.sample("b1", normal(H))
    w2 = pyro.sample("w2", normal(H, 1, scale=H**-0.5))
    b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    mean = (torch.tanh(x @ w1 + b1) @ w2).squeeze(-1) + b2
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def broadcasting(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    observe((x * w.unsqueeze(-2)).sum(-1), noise, y)


def plated_weights(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("features", D):
        w = pyro.sample("w", dist.Laplace(0.0, 1.0))
    observe(x @ w, 0.5, y)


def plate_as_long_as_the_data(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("units", N):  # global, though of the size of the training data
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    observe(torch.tanh(x.sum(-1, keepdim=True) + torch.linspace(-1, 1, N)) @ w, 0.5, y)


def positive_scale(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    observe(x @ w, noise, y)


def simplex_mixture(x: Tensor, y: Tensor | None = None) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    observe(x @ weights, 0.5, y)


def lower_cholesky(x: Tensor, y: Tensor | None = None) -> None:
    corr = pyro.sample("corr", dist.LKJCholesky(D, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([D]).to_event(1))
    z = pyro.sample("z", normal(D))
    observe(x @ (scale * (corr @ z)), 0.5, y)


class _GaussianCholesky(dist.TorchDistribution):
    """Standard normal entries below the diagonal, half normal on it (for a site with support lower_cholesky)."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.lower_cholesky
    has_rsample = False

    def __init__(self, size: int) -> None:
        super().__init__(torch.Size(), torch.Size((size, size)), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raw = torch.randn(torch.Size(sample_shape) + self.event_shape)
        return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).abs())

    def log_prob(self, value: Tensor) -> Tensor:
        size = self.event_shape[-1]
        constant = size * (size + 1) / 2 * 0.9189385332046727 - size * 0.6931471805599453
        return -0.5 * value.tril().square().sum((-2, -1)) - constant


def cholesky_factor(x: Tensor, y: Tensor | None = None) -> None:
    factor = pyro.sample("factor", _GaussianCholesky(D))
    observe((x @ factor).sum(-1), 0.5, y)


def bounded(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Uniform(-2.0, 3.0).expand([D]).to_event(1))
    mix = pyro.sample("mix", dist.Beta(2.0, 3.0))
    observe(mix * (x @ slope), 0.5, y)


def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(D), tau).to_event(1))
    noise = pyro.sample("noise", dist.InverseGamma(3.0, 1.0))
    observe(x @ w, noise.sqrt(), y)


def global_factor(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    pyro.factor("penalty", -w.abs().sum())
    observe(x @ w, 0.5, y)


def factor_per_datum(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    mean = x @ w
    with pyro.plate("data", len(x)):
        pyro.factor("extra", -0.1 * mean.square())
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def log_normal_prior(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.LogNormal(0.0, 0.5).expand([D]).to_event(1))
    observe(x @ w, 0.5, y)


def transformed_prior(x: Tensor, y: Tensor | None = None) -> None:
    base = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    moves = [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.SigmoidTransform()]
    w = pyro.sample("w", dist.TransformedDistribution(base, moves))
    observe(x @ w, 0.5, y)


def dict_inputs(x: dict[str, Tensor], y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    table = pyro.sample("table", normal(3))
    observe(x["numbers"] @ w + table[x["group"]], 0.5, y)


def tuple_inputs(x: tuple[Tensor, Tensor], y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    left, right = x
    observe((left - right) @ w, 0.5, y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D, 3))
    b = pyro.sample("b", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ w + b), obs=y)


def yes_or_no(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D, scale=0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)


def heavy_tails(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(5.0, x @ w, scale), obs=y)


def heteroscedastic(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D, 2, scale=0.5))
    b = pyro.sample("b", normal(2, scale=0.5))
    out = x @ w + b
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(out[:, 0], torch.nn.functional.softplus(out[:, 1])), obs=y)


def two_outputs(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D, 2))
    noise = pyro.sample("noise", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise).to_event(1), obs=y)


def two_plates(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D, 2))
    with pyro.plate("outputs", 2, dim=-1), pyro.plate("data", len(x), dim=-2):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def embedding(x: Tensor, y: Tensor | None = None) -> None:
    table = pyro.sample("table", normal(5, H))
    w = pyro.sample("w", normal(H))
    hidden = torch.nn.functional.embedding(x, table).mean(-2)
    observe(hidden @ w, 0.5, y)


def one_number(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    observe(mean.expand(x.shape[0]), 0.5, y)


def subsampling(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    mean = x @ w
    with pyro.plate("data", size=N, subsample_size=min(4, len(x))):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def subsampling_by_index(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    with pyro.plate("data", size=N, subsample_size=4) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=None if y is None else y[rows])


def plain_twin_of_subsampling(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    observe(x @ w, 0.5, y)


def deterministic_sites(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    mean = pyro.deterministic("mean", x @ w)
    pyro.deterministic("norm", w.square().sum())
    observe(mean, 0.5, y)


def one_effect_per_datum(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(D))
    with pyro.plate("data", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.5))
        pyro.sample("y", dist.Normal(x @ w + effect, 0.5), obs=y)


def plain(model: Callable[..., Any]) -> Callable[[int], Callable[..., Any]]:
    """Factory of a model without constants of its own."""
    return lambda seed: model


CASES: list[Case] = [
    Case("pyro_module", lambda seed: PyroNet(), X, Y),
    Case("by_hand", plain(by_hand), X, Y),
    Case("broadcasting", plain(broadcasting), X, Y, broadcasts=True),
    Case("plated_weights", plain(plated_weights), X, Y),
    Case("plate_as_long_as_the_data", plain(plate_as_long_as_the_data), X, Y),
    Case("positive_scale", plain(positive_scale), X, Y),
    Case("simplex", plain(simplex_mixture), X, Y),
    Case("corr_cholesky", plain(lower_cholesky), X, Y),
    Case("lower_cholesky", plain(cholesky_factor), X, Y),
    Case("bounded", plain(bounded), X, Y),
    Case("hierarchical", plain(hierarchical), X, Y),
    Case("global_factor", plain(global_factor), X, Y),
    Case("factor_per_datum", plain(factor_per_datum), X, Y),
    Case("log_normal_prior", plain(log_normal_prior), X, Y),
    Case("transformed_prior", plain(transformed_prior), X, Y),
    Case("dict_inputs", plain(dict_inputs), {"numbers": X, "group": LABELS}, Y),
    Case("tuple_inputs", plain(tuple_inputs), (X, X.flip(0)), Y),
    Case("categorical", plain(classes), X, LABELS, task="classification"),
    Case("bernoulli", plain(yes_or_no), X, (Y > 0).to(Y.dtype), task="classification"),
    Case("poisson", plain(counts), X, LABELS.to(Y.dtype), task="count"),
    Case("student_t", plain(heavy_tails), X, Y),
    Case("heteroscedastic", plain(heteroscedastic), X, Y),
    Case("two_outputs", plain(two_outputs), X, torch.stack([Y, -Y], -1)),
    Case("two_plates", plain(two_plates), X, torch.stack([Y, -Y], -1)),
    Case("conv", lambda seed: ConvNet(), IMAGES, LABELS, task="classification"),
    Case("embedding", plain(embedding), TOKENS, Y),
    Case("one_number", plain(one_number), X, Y),
    Case("one_datum", plain(by_hand), X[:1], Y[:1]),
    Case("subsampling", plain(subsampling), X, Y),
    Case("subsampling_by_index", plain(subsampling_by_index), X, Y),
    Case("frozen_features", FrozenFeatures, X, Y),
    Case("deterministic_sites", plain(deterministic_sites), X, Y),
    Case("local_effects", plain(one_effect_per_datum), X, Y, local=True),
]
