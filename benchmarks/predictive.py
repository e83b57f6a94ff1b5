"""Task "predictive": 1,000 draws of the weights x 1,000 inputs, `posterior.predict` against `pyro.infer.Predictive`.

`Predictive` returns a sample of y for every draw and input. Ours is timed for moments (what `predict` computes at once)
and for moments with the same number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.infer import Predictive
from torch import Tensor

from benchmarks.measure import Case, Contestant, NotRun, Settings, Versus
from benchmarks.problems import Problem, energy, random_images, relative_difference
from inference import NUTS, DrawsPosterior

MOMENTS, SAMPLES = "ours, predict", "ours, predict and sample"
SEQUENTIAL, PARALLEL = "Pyro Predictive", "Pyro Predictive, parallel=True"


def cases(settings: Settings) -> Iterator[Case | NotRun]:
    """A small network, and one bound by its matrix products."""
    draws = 20 if settings.quick else 1000
    small = energy()
    yield _case(small, small.x.repeat(2, 1)[:1000], draws, goal=5.0, calls=1 if settings.quick else 3)
    if settings.quick:
        return
    big = random_images((200,), 1000)
    yield _case(big, big.x, draws, goal=1.0, calls=1)


def _case(problem: Problem, x: Tensor, num_draws: int, goal: float, calls: int) -> Case:
    target = problem.target()
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat([torch.full(shape, problem.prior_scale(shape)).flatten() for _, shape in problem.sites])
    draws = scales * torch.randn(num_draws, problem.dim, generator=generator)
    posterior = DrawsPosterior(target, draws[None], backend=NUTS(num_samples=num_draws))
    model, sites = problem.pyro_model(), problem.named(draws)

    def pyro(parallel: bool) -> Tensor:
        with torch.no_grad():
            return Predictive(broadcasting if parallel else model, sites, return_sites=("y",), parallel=parallel)(x)[
                "y"
            ]

    # In parallel every site has the draws on the left of the data plate; our own model is written for that.
    broadcasting = problem.ours()
    contestants = [
        Contestant(MOMENTS, lambda: posterior.predict(x), calls),
        Contestant(SAMPLES, lambda: posterior.predict(x).sample(num_draws), calls),
        Contestant(SEQUENTIAL, lambda: pyro(False), calls),
    ]
    ratios = [Versus(SEQUENTIAL, MOMENTS, goal), Versus(SEQUENTIAL, SAMPLES)]
    if not problem.classes:
        contestants.append(Contestant(PARALLEL, lambda: pyro(True), calls))
        ratios += [Versus(PARALLEL, MOMENTS, goal), Versus(PARALLEL, SAMPLES)]
    for contestant in contestants:
        contestant.call()

    few = slice(0, 10)
    returned = Predictive(model, {n: v[few] for n, v in sites.items()}, return_sites=("_RETURN",))
    functions = DrawsPosterior(target, draws[None, few], backend=posterior.backend).predict(x).component_functions()
    outputs = returned(x)["_RETURN"].detach()
    if problem.classes:  # logits are defined up to a constant
        functions, outputs = functions.log_softmax(-1), outputs.log_softmax(-1)
    return Case(
        f"{problem.name}, {num_draws:,} draws x {len(x):,} inputs",
        "ms",
        "prediction",
        contestants,
        ratios,
        {"network outputs, ours against Pyro": relative_difference(functions, outputs)},
        [] if not problem.classes else ["Gaussian inputs. `parallel=True` is left out: hidden layers of 0.8 GB each."],
    )
