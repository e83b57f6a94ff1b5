"""The networks of the image studies as plain modules: LeNet, and ResNet-20 with its training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import laplace


def lenet(seed: int) -> nn.Sequential:
    """The LeNet of the benchmark "laplace", with torch's initial weights.

    Args:
        seed: Seed of the weights.

    Returns:
        The network, not trained; it takes images (N, 1, 28, 28).
    """
    images = torch.zeros(1, 784)
    net = laplace.train("lenet", images, torch.zeros(1, dtype=torch.long), images, epochs=0).net
    torch.manual_seed(seed)
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    return net


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights, as for CIFAR in He et al. (2016).

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Activations, (N, inputs, H, W).

        Returns:
            (N, outputs, H / stride, W / stride).
        """
        hidden = self.norm2(self.second(torch.relu(self.norm1(self.first(x)))))
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return torch.relu(hidden + shortcut)


def resnet(seed: int, blocks: int = 3, width: int = 16) -> nn.Sequential:
    """A ResNet with batch norm for images (N, 3, 32, 32) and 10 classes.

    Args:
        seed: Seed of the weights.
        blocks: Blocks of each of the three stages; 3 makes ResNet-20.
        width: Channels of the first stage; 16 makes ResNet-20, of 0.27 M weights.

    Returns:
        The network, not trained.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        for number in range(blocks):
            layers.append(Block(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Nesterov's SGD with a cosine schedule.

    Attributes:
        epochs: Passes over the data.
        batch: Images per step.
        step_size: Learning rate at the start, on the mean loss.
        precision: Precision of the Gaussian prior of the weights other than batch norm's, total, not per datum.
        seed: Seed of the order of the images.
    """

    epochs: int
    batch: int = 64
    step_size: float = 0.05
    precision: float = 0.0
    seed: int = 0


def train(net: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> float:
    r"""Minimise :math:`\tfrac1N \left[-\log p(y \mid x, w) + \tfrac{\delta}{2} \|w\|^2\right]`, and leave eval mode on.

    Args:
        net: The network, trained in place.
        x: Images, (N, C, H, W).
        y: Labels, (N,).
        recipe: How.

    Returns:
        Seconds.
    """
    began = time.perf_counter()
    batch = min(recipe.batch, len(x))
    each = len(x) // batch
    normalising = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    decayed = [p for p in net.parameters() if id(p) not in normalising]
    free = [p for p in net.parameters() if id(p) in normalising]
    groups = [{"params": decayed, "weight_decay": recipe.precision / len(x)}, {"params": free}]
    optimiser = torch.optim.SGD([g for g in groups if g["params"]], recipe.step_size, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, recipe.epochs * each))
    order = torch.Generator().manual_seed(recipe.seed)
    net.train()
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(x), generator=order).to(x.device).split(batch)[:each]:
            optimiser.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    net.eval()
    return time.perf_counter() - began
