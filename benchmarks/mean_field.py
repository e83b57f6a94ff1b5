"""Task "mean_field": one step of mean-field variational inference, ours against Pyro's SVI with AutoNormal.

A step is noise, minibatch, free energy, gradient and Adam. Ours has the KL in closed form; Pyro's `Trace_ELBO` draws
it. All start at the same means, with standard deviation 0.01 and N(0, 1) priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

from benchmarks import environments
from benchmarks.measure import Case, Contestant, NotRun, Settings, Versus, built
from benchmarks.problems import NOISE, Problem, energy, random_images
from inference.backend import Batches
from inference.target import Target
from inference.variational.free_energy import free_energy, gaussian_prior
from inference.variational.mean_field import make_step

RATE, SCALE = 1e-3, 0.01
EAGER, COMPILED = "ours, eager", "ours, compiled"
TRACE, JIT = "Pyro Trace_ELBO", "Pyro JitTrace_ELBO"
NUMPYRO = "NumPyro, jit and scan"


def cases(settings: Settings) -> Iterator[Case | NotRun]:
    """A small network on all the data at once, and a large one on minibatches."""
    if settings.quick:
        yield from _case(energy((3,), fan_in=False), None, 3, {}, settings)
        return
    yield from _case(energy(fan_in=False), None, 100, {EAGER: 6.0, COMPILED: 20.0}, settings)
    big = random_images((400, 400), 1_280, fan_in=False)
    yield from _case(big, 128, 10, {EAGER: 2.5, COMPILED: 2.5}, settings)


def _case(
    problem: Problem, batch_size: int | None, calls: int, goals: dict[str, float], settings: Settings
) -> Iterator[Case | NotRun]:
    target = problem.target()
    theta = target.initial(1, seed=0)[0]
    makers: dict[str, Callable[[], Callable[[], object]]] = {EAGER: lambda: ours(target, theta, batch_size, False)}
    if not settings.quick:
        makers[COMPILED] = lambda: ours(target, theta, batch_size, True)
    makers[TRACE] = lambda: theirs(problem, theta, batch_size, Trace_ELBO(), "trace")
    makers[JIT] = lambda: theirs(problem, theta, batch_size, JitTrace_ELBO(ignore_jit_warnings=True), "jit")
    contestants = []
    for name, make in makers.items():
        call, seconds = built(make)
        contestants.append(Contestant(name, call, calls, seconds))

    elbo = our_elbo(target, theta)
    agreement = {"ELBO at the start, Pyro's relative difference to ours": abs(pyro_elbo(problem, theta) / elbo - 1)}
    if settings.foreign and batch_size is None:
        try:
            peer = environments.start(
                "numpyro", "svi", x=problem.x, y=problem.y, theta=theta, sizes=problem.sizes, noise=NOISE
            )
        except environments.PeerError as error:
            yield NotRun(f"{problem.name}: NumPyro", str(error))
        else:
            timing = {"timer": peer.seconds, "build_seconds": peer.build_seconds}
            contestants.append(Contestant(NUMPYRO, calls=10 * calls, **timing))
            agreement["the same, NumPyro's"] = abs(-peer.result[0] / elbo - 1)
    names = {c.name for c in contestants}
    wanted = [Versus(TRACE, name, goals.get(name)) for name in (EAGER, COMPILED)]
    wanted += [Versus(slow, name) for slow in (JIT, NUMPYRO) for name in (EAGER, COMPILED)]
    where = f"batch {batch_size}" if batch_size else f"full batch of {len(problem.x)}"
    yield Case(
        f"{problem.name}, P = {problem.dim:,}, {where}",
        "us",
        "step",
        contestants,
        [v for v in wanted if {v.slow, v.fast} <= names],
        agreement,
        ["Gaussian inputs with random labels."] if problem.classes else [],
    )


def ours(target: Target, theta: Tensor, batch_size: int | None, compiled: bool) -> Callable[[], object]:
    """One round of the loop in `MeanFieldVI.fit_target`."""
    batches = Batches(target, batch_size, target.streams(0, 1))
    step = make_step(target, batches, 1, _start(theta), compiled, num_steps=1)
    noise = target.stream(0, 1)

    def call() -> Tensor:
        eps = torch.randn((1, target.dim), generator=noise, dtype=target.dtype)
        x, y = batches.next()
        return step(eps, x if batches.full else x[0], y if batches.full else y[0], 1.0, RATE)

    return call


def theirs(
    problem: Problem, theta: Tensor, batch_size: int | None, elbo: Trace_ELBO, prefix: str
) -> Callable[[], object]:
    """Pyro's SVI step; every contestant has guide parameters of its own in the parameter store."""
    svi = SVI(*_model_and_guide(problem, theta, prefix), pyro.optim.Adam({"lr": RATE}), elbo)
    x, y = problem.x, problem.y
    if batch_size is None:
        return lambda: svi.step(x, y)

    def call() -> float:
        rows = torch.randint(len(x), (batch_size,))
        return svi.step(x[rows], y[rows])

    return call


def _start(theta: Tensor) -> Tensor:
    """Means and softplus-inverse standard deviations, (2P,)."""
    return torch.cat([theta, torch.full_like(theta, math.log(math.expm1(SCALE)))])


def our_elbo(target: Target, theta: Tensor) -> float:
    """ELBO by our objective at the start, on all the data, nats."""
    eps = torch.randn((20, target.dim), generator=target.stream(0), dtype=target.dtype)
    per_datum = free_energy(target, gaussian_prior(target), _start(theta), eps, target.x, target.y, 1.0)
    return -float(per_datum) * target.num_data


def pyro_elbo(problem: Problem, theta: Tensor) -> float:
    """ELBO by Pyro at the start, on all the data, nats."""
    model, guide = _model_and_guide(problem, theta, "elbo")
    return -Trace_ELBO(num_particles=20).loss(model, guide, problem.x, problem.y)


def _model_and_guide(problem: Problem, theta: Tensor, prefix: str) -> tuple[Callable[..., Tensor], AutoNormal]:
    pyro.set_rng_seed(0)
    model = problem.pyro_model(len(problem.x))
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=problem.named(theta)), init_scale=SCALE)
    guide._pyro_name = f"{prefix}.{problem.name}"
    return model, guide
