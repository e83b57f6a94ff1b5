"""Task "leapfrog": one leapfrog step, value and gradient included, of one chain on UCI energy.

Ours twice over: the plain update around `Target.log_density_and_grad` (the seam that every backend uses), and the
recorded program of HMC and NUTS, which also computes energies. Pyro's is the integrator its own NUTS calls, on the
potential its own kernel set up. "Its own arithmetic" is the least that a leapfrog must do: the matrix products of a
forward and a backward pass, each activation, and one multiplication by its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pyro
import torch
from pyro.infer import NUTS
from pyro.ops.integrator import potential_grad, velocity_verlet
from torch import Tensor

from benchmarks import environments
from benchmarks.measure import Case, Contestant, NotRun, Settings, Versus, built
from benchmarks.problems import NOISE, Problem, energy, relative_difference
from inference.mcmc.integrators import GRADIENT, MOMENTUM, POSITION, leapfrog, leapfrog_program

ARITHMETIC = "its own arithmetic"
STEP_SIZE = 1e-5  # far below the stability limit of every case
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]


def cases(settings: Settings) -> Iterator[Case | NotRun]:
    """One case for each network."""
    hidden = [(3,)] if settings.quick else [(50,), (50, 50), (200, 200)]
    for widths in hidden:
        yield from _case(energy(widths), settings, first=widths == hidden[0])


def _case(problem: Problem, settings: Settings, first: bool) -> Iterator[Case | NotRun]:
    target = problem.target()
    theta = target.initial(1, seed=0)
    momentum = torch.randn(1, problem.dim, generator=torch.Generator().manual_seed(1))
    hand = by_hand(problem)
    expected = hand(theta[0])[1]
    options = [False] if settings.quick else [False, True]
    makers: dict[str, Callable[[], Callable[[], object]]] = {}
    for compiled in options:
        label = "compiled" if compiled else "eager"
        makers[f"ours, {label}"] = lambda c=compiled: walk(target.log_density_and_grad(1, compile=c), theta, momentum)
        makers[f"ours, sampler's program, {label}"] = lambda c=compiled: _program(target, theta, momentum, c)
    makers[ARITHMETIC] = lambda: arithmetic(problem)
    makers["torch by hand, autograd"] = lambda: walk(hand, theta[0], momentum[0])
    makers["Pyro"] = lambda: _pyro(problem, theta[0], momentum[0], jit=False)
    if not settings.quick:
        makers["Pyro, jit_compile"] = lambda: _pyro(problem, theta[0], momentum[0], jit=True)
    calls = 5 if settings.quick else 300 if problem.dim < 1000 else 100 if problem.dim < 10_000 else 20
    contestants = [Contestant(name, *_built(make, calls)) for name, make in makers.items()]

    agreement = {
        "gradient, seam against torch by hand": relative_difference(
            target.log_density_and_grad(1)(theta)[1][0], expected
        ),
        "gradient, Pyro against torch by hand": relative_difference(_pyro_gradient(problem, theta[0]), expected),
    }
    if settings.foreign and first:
        try:
            peer = environments.start(
                "numpyro", "leapfrog", x=problem.x, y=problem.y, theta=theta[0], sizes=problem.sizes, noise=NOISE
            )
        except environments.PeerError as error:
            yield NotRun(f"{problem.name}: NumPyro", str(error))
        else:
            contestants.append(
                Contestant(
                    "NumPyro, jit and scan", calls=20 * calls, timer=peer.seconds, build_seconds=peer.build_seconds
                )
            )
            agreement["gradient, NumPyro against torch by hand"] = relative_difference(
                torch.tensor(peer.result), expected
            )
    yield Case(
        f"{problem.name}, UCI energy, N = {len(problem.x)}, P = {problem.dim}",
        "us",
        "leapfrog",
        contestants,
        list(_ratios({c.name for c in contestants}, first)),
        agreement,
    )


def _built(make: Callable[[], Callable[[], object]], calls: int) -> tuple[Callable[[], object], int, float]:
    call, seconds = built(make)
    return call, calls, seconds


def _ratios(names: set[str], first: bool) -> Iterator[Versus]:
    hand = "torch by hand, autograd"
    wanted = [
        Versus(hand, "ours, eager", 1.0),
        Versus(hand, "ours, compiled", 2.5),
        Versus("Pyro", "ours, eager", 4.0 if first else None),
        Versus("Pyro", "ours, compiled", 9.0 if first else None),
        Versus("Pyro, jit_compile", "ours, eager"),
        Versus("Pyro, jit_compile", "ours, compiled"),
        Versus(hand, "ours, sampler's program, eager"),
        Versus(hand, "ours, sampler's program, compiled"),
        Versus("Pyro", "ours, sampler's program, compiled"),
        Versus(ARITHMETIC, "ours, sampler's program, compiled", round(1 / 1.5, 3)),
        Versus("NumPyro, jit and scan", "ours, compiled"),
        Versus("NumPyro, jit and scan", "ours, sampler's program, compiled"),
    ]
    return (v for v in wanted if {v.slow, v.fast} <= names)


def by_hand(problem: Problem) -> Gradient:
    """Value and gradient by autograd through plain torch."""
    log_density = problem.by_hand()

    def value_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            value = log_density(theta)
            return value.detach(), torch.autograd.grad(value, theta)[0]

    return value_and_grad


def arithmetic(problem: Problem) -> Callable[[], object]:
    """Matrix products and activations of one leapfrog in torch, without allocations, with the data along memory."""
    columns, num = problem.x.T.contiguous(), len(problem.x)
    weights = [torch.randn(b, a) / a**0.5 for a, b in pairwise(problem.sizes)]
    inputs = [columns, *(torch.empty(len(w), num) for w in weights[:-1])]  # of every layer, (H, N)
    sums, outputs = [torch.empty_like(a) for a in inputs[1:]], torch.empty(problem.sizes[-1], num)
    deltas, gradients = [torch.empty_like(a) for a in sums], [torch.empty(w.shape[::-1]) for w in weights]

    def call() -> None:
        for layer, weight in enumerate(weights[:-1]):
            torch.mm(weight, inputs[layer], out=sums[layer])
            torch.sigmoid(sums[layer], out=inputs[layer + 1])
        delta = torch.mm(weights[-1], inputs[-1], out=outputs)
        for layer in reversed(range(len(weights))):
            torch.mm(inputs[layer], delta.T, out=gradients[layer])
            if layer:
                torch.mm(weights[layer].T, delta, out=deltas[layer - 1])
                delta = torch.mul(deltas[layer - 1], inputs[layer], out=deltas[layer - 1])

    return call


def walk(value_and_grad: Gradient, theta: Tensor, momentum: Tensor) -> Callable[[], object]:
    """A trajectory that goes one leapfrog further at each call."""
    _, gradient = value_and_grad(theta)
    state = [theta, momentum, gradient]
    step_size, inverse_mass = torch.tensor(STEP_SIZE), torch.ones_like(theta)

    def call() -> None:
        with torch.no_grad():
            state[:] = leapfrog(*state, step_size, inverse_mass, value_and_grad)[:3]

    return call


def _program(target, theta: Tensor, momentum: Tensor, compiled: bool) -> Callable[[], object]:
    block = torch.zeros(4, 1, target.dim)
    block[POSITION], block[MOMENTUM] = theta, momentum
    block[GRADIENT] = target.log_density_and_grad(1)(theta)[1]
    inverse_mass = torch.ones(1, target.dim)
    program = leapfrog_program(target.log_density, block, inverse_mass, compile=compiled)
    state, steps, slots = [block], torch.full((1,), STEP_SIZE), torch.zeros(2, 1, 0, target.dim)

    def call() -> None:
        with torch.no_grad():
            state[0] = program(state[0], steps, inverse_mass, slots)[0]

    return call


def _pyro_kernel(problem: Problem, jit: bool) -> NUTS:
    pyro.set_rng_seed(0)
    kernel = NUTS(
        problem.pyro_model(), step_size=STEP_SIZE, adapt_step_size=False, jit_compile=jit, ignore_jit_warnings=True
    )
    kernel.setup(0, problem.x, problem.y)
    return kernel


def _pyro(problem: Problem, theta: Tensor, momentum: Tensor, jit: bool) -> Callable[[], object]:
    kernel = _pyro_kernel(problem, jit)
    z = {name: value.clone() for name, value in problem.named(theta).items()}
    r = problem.named(momentum)
    gradients, _ = potential_grad(kernel.potential_fn, z)
    state = [z, r, gradients]
    kinetic_grad = kernel.mass_matrix_adapter.kinetic_grad

    def call() -> None:
        z, r, gradients = state
        state[:] = velocity_verlet(z, r, kernel.potential_fn, kinetic_grad, STEP_SIZE, 1, gradients)[:3]

    return call


def _pyro_gradient(problem: Problem, theta: Tensor) -> Tensor:
    z = {name: value.clone() for name, value in problem.named(theta).items()}
    gradients, _ = potential_grad(_pyro_kernel(problem, jit=False).potential_fn, z)
    return -torch.cat([gradients[name].flatten() for name, _ in problem.sites])
