"""Small networks with every kind of layer, as targets at a random theta: what layerwise curvature is tested on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bnn_models import bayesianize, likelihoods
from inference.target import Target, compile_target
from tests.cases import normal

N = 6
LABELS = torch.arange(N) % 3


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(4, 5)), pyro.sample("b1", normal(5, scale=2.0))
    w2, b2 = pyro.sample("w2", normal(5, 3, scale=0.5)), pyro.sample("b2", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 / 2.0 + b1) @ w2 + b2), obs=y)


def learnt_noise(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(4, 5)), pyro.sample("b1", normal(5))
    w2 = pyro.sample("w2", normal(5))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1 + b1) @ w2, noise), obs=y)


class Encoder(nn.Module):
    """Token embedding, one transformer layer, the mean over positions, three classes."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first)
        self.last = nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.embedding(x if self.batch_first else x.T))
        return self.last(hidden.mean(1 if self.batch_first else 0))


class CrossAttention(nn.Module):
    """Attention whose query differs from keys and values: its projections are parts of one site."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.query(x), x, x)[0].mean(1))


class SmallResNet(nn.Module):
    """Two convolutions with batch norm and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(i, 3, 3, padding=1, bias=False) for i in (1, 3))
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 3)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.first(x)))
        return self.last(torch.relu(hidden + self.norm2(self.second(hidden))).mean((2, 3)))


class SharedWeight(nn.Module):
    """One linear layer used twice, over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))).mean(1))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4, dilation=2), nn.Flatten(), nn.Linear(4, 3)
    )


def sequence_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))


_TOKENS = torch.arange(5 * N).reshape(N, 5) * 3 % 7
_IMAGES, _SEQUENCES = (N, 1, 4, 4), (N, 5, 4)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Tensor]] = {
    "lenet": (lenet, _IMAGES),
    "resnet": (SmallResNet, _IMAGES),
    "grouped": (grouped, (N, 2, 4, 4)),
    "sequence_convolution": (sequence_convolution, (N, 2, 6)),
    "encoder": (lambda: Encoder(True), _TOKENS),
    "encoder_sequence_first": (lambda: Encoder(False), _TOKENS),
    "cross_attention": (CrossAttention, _SEQUENCES),
    "shared_weight": (SharedWeight, _SEQUENCES),
}
HAND_WRITTEN = {"by_hand": by_hand, "learnt_noise": learnt_noise}
NAMES = [*HAND_WRITTEN, *MODULES]


@functools.cache
def network(name: str) -> tuple[Target, Tensor]:
    """A target and a random theta."""
    if name in HAND_WRITTEN:
        y = _draw(N) if name == "learnt_noise" else LABELS
        target = compile_target(HAND_WRITTEN[name], _draw(N, 4), y)
    else:
        make, x = MODULES[name]
        torch.manual_seed(0)
        model = bayesianize(make().double().eval(), likelihood=likelihoods.Categorical())
        target = compile_target(model, x if isinstance(x, Tensor) else _draw(*x), LABELS)
    theta = 0.5 * torch.randn(target.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return target, theta
