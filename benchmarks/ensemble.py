"""Task "ensemble": ten members, `DeepEnsemble` against a Python loop over ten `nn.Sequential` with fused Adam.

Same starting points, steps, batch size, learning rate and loss (up to a constant factor, to which Adam is indifferent);
the shuffling differs. Ours is timed as a user calls it: recording the model, and compilation if it is chosen, included.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.measure import Case, Contestant, NotRun, Settings, Versus
from benchmarks.problems import Problem, energy, mnist
from bnn_models import MLP, likelihoods
from inference import DeepEnsemble

BATCH = 100
LOOP, OURS, COMPILED = "loop over members, fused Adam", "ours", "ours, compile=True"


def cases(settings: Settings) -> Iterator[Case | NotRun]:
    """A small network, bound by dispatches, and one whose matrix products fill a core."""
    epochs = 2 if settings.quick else 200
    yield _case(
        energy(), "UCI energy, N = 691", 2 if settings.quick else 10, epochs, 1e-2, 3.5, compiled=not settings.quick
    )
    problem = None if settings.quick else mnist((200,), 5000)
    if problem is None:
        yield NotRun(
            "784-200-10 relu, MNIST 5,000", "MNIST is not in the data cache (`bnn-zoo data get mnist`, or BNN_ZOO_DATA)"
        )
        return
    yield _case(problem, "MNIST, N = 5,000", 10, 3, 1e-3, 1.0, compiled=False)


def _case(problem: Problem, where: str, members: int, epochs: int, rate: float, goal: float, compiled: bool) -> Case:
    batches = len(problem.x) // BATCH
    nets = [network(problem, seed) for seed in range(members)]
    starts = torch.stack([parameters_to_vector(net.parameters()).detach() for net in nets])
    found: dict[str, float] = {}

    def loop() -> None:
        trained = [train(problem, network(problem, seed), seed, epochs, rate) for seed in range(members)]
        found[LOOP] = final_loss(problem, torch.stack(trained))

    def ours(compile: bool | str = "auto") -> None:
        likelihood = likelihoods.Categorical(problem.sizes[-1]) if problem.classes else likelihoods.Normal(1.0)
        model = MLP(problem.sizes, activation="relu" if problem.classes else "tanh", likelihood=likelihood)
        backend = DeepEnsemble(
            num_members=members,
            num_steps=epochs * batches,
            step_size=rate,
            batch_size=BATCH,
            schedule="constant",
            prior=False,
            compile=compile,
            progress=False,
        )
        posterior = backend.fit(model, problem.x, problem.y, init=starts)
        found[OURS] = final_loss(problem, posterior.draws[0])

    contestants = [Contestant(OURS, ours), Contestant(LOOP, loop)]
    ratios = [Versus(LOOP, OURS, goal)]
    if compiled:
        contestants.insert(1, Contestant(COMPILED, lambda: ours(True)))
        ratios.append(Versus(LOOP, COMPILED))
    for contestant in contestants:  # warms up, and fills `found`
        contestant.call()
    return Case(
        f"{members} members {problem.name}, {where}, {epochs} epochs, batch {BATCH}",
        "s",
        "whole fit",
        contestants,
        ratios,
        {f"mean final training loss, {name}": value for name, value in found.items()},
    )


def network(problem: Problem, seed: int) -> nn.Sequential:
    """A member as PyTorch initialises it."""
    torch.manual_seed(seed)
    activation = nn.ReLU if problem.classes else nn.Tanh
    layers: list[nn.Module] = []
    for a, b in pairwise(problem.sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def train(problem: Problem, net: nn.Sequential, seed: int, epochs: int, rate: float) -> Tensor:
    """Train one member; its parameters as one vector."""
    torch.manual_seed(seed)
    x, y = problem.x, problem.y
    loss = nn.functional.cross_entropy if problem.classes else nn.functional.mse_loss
    optimiser = torch.optim.Adam(net.parameters(), rate, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].view(-1, BATCH):
            outputs = net(x[rows])
            optimiser.zero_grad()
            loss(outputs if problem.classes else outputs.squeeze(-1), y[rows]).backward()
            optimiser.step()
    return parameters_to_vector(net.parameters()).detach()


def final_loss(problem: Problem, thetas: Tensor) -> float:
    """Mean over members of the loss on all the training data."""
    loss = nn.functional.cross_entropy if problem.classes else nn.functional.mse_loss
    with torch.no_grad():
        losses = [loss(problem.network(list(problem.named(t).values()), problem.x), problem.y) for t in thetas]
    return float(torch.stack(losses).mean())
