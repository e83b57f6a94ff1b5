"""The float64 twin of a float32 target."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import grad_and_value, vmap

from inference.backend import Run
from inference.data import map_tree
from inference.double import in_double, with_precise_prior
from inference.graph import capture
from inference.mcmc.hamiltonian import precise_log_density
from inference.optimisation import energy_per_datum, polish
from inference.point import MAP
from inference.target import Target, compile_target
from tests.cases import CASES, Case, X, Y, tanh_network


def narrow(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def in_single(case: Case) -> Target:
    torch.set_default_dtype(torch.float32)  # of a case's own constants; conftest sets it back
    model = case.model()
    model = model.float() if isinstance(model, torch.nn.Module) else model
    return compile_target(model, map_tree(narrow, case.x), narrow(case.y))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_twin_has_the_density_and_gradient_of_its_target(case: Case) -> None:
    single = in_single(case)
    theta = 0.3 * torch.randn(2, single.dim, generator=torch.Generator().manual_seed(0))
    value, gradient = in_double(single).log_density_and_grad(2, compile=False)(theta.double())
    expected, slope = single.log_density_and_grad(2, compile=False)(theta)
    assert value.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.float(), slope, rtol=1e-3, atol=1e-3)


def test_the_twin_is_free_of_single_rounding() -> None:
    target = compile_target(tanh_network(3, 4), X.float(), Y.float())
    twin = in_double(target)
    theta = torch.randn(target.dim, generator=torch.Generator().manual_seed(0))
    step = 1e-9 * torch.randn(target.dim, generator=torch.Generator().manual_seed(1))
    change = twin.log_density(theta + step) - twin.log_density(theta)
    slope = torch.func.grad(twin.log_density)(theta) @ step
    assert float(change / slope) == pytest.approx(1.0, abs=1e-4)


def test_a_float64_target_is_its_own_twin() -> None:
    target = compile_target(tanh_network(3, 4), X, Y)
    assert in_double(target) is target


def test_temperatures_and_restrictions_carry_over() -> None:
    target = compile_target(tanh_network(3, 4), X.float(), Y.float()).tempered(2.0, 3.0)
    part = target.restrict("w1", 0.1 * torch.ones(target.dim, dtype=torch.float32))
    theta = torch.linspace(-1, 1, part.dim)
    torch.testing.assert_close(
        in_double(part).log_density(theta), part.log_density(theta.float()).double(), rtol=1e-5, atol=0
    )


def test_polishing_a_float32_network_ends_where_polishing_its_twin_does() -> None:
    target = compile_target(tanh_network(3, 4), X.float(), Y.float())
    run = Run(MAP(progress=False, compile=False), target, 0)
    start = target.initial(1, seed=3)[0]
    end = polish(target, run, start, max_steps=2000)
    assert end.dtype == torch.float32
    twin = in_double(target)
    best = polish(twin, run, end.double(), max_steps=2000)
    loss = energy_per_datum(twin)
    # what rounding theta to float32 costs
    assert float(loss(end.double(), twin.x, twin.y) - loss(best, twin.x, twin.y)) < 1e-9


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_precise_prior_leaves_density_and_gradient_as_they_are(case: Case) -> None:
    single = in_single(case)
    theta = 0.3 * torch.randn(2, single.dim, generator=torch.Generator().manual_seed(0))
    log_density, leaves = precise_log_density(single)
    gradient, value = vmap(grad_and_value(log_density), in_dims=(0, *(None for _ in leaves)))(theta, *leaves)
    expected, slope = single.log_density_and_grad(2, compile=False)(theta)
    assert value.dtype == torch.float64
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-4)


def wide_model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    zero = torch.zeros((), dtype=x.dtype)
    weight = pyro.sample("weight", dist.Normal(zero, 0.01).expand((100_000,)).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(zero + 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x * weight.sum(), scale), obs=y)


def test_a_precise_prior_has_its_sums_in_float64() -> None:
    target = compile_target(wide_model, torch.ones(3, dtype=torch.float32), torch.ones(3, dtype=torch.float32))
    theta = 0.01 * torch.randn(target.dim, generator=torch.Generator().manual_seed(0)).float()
    joint = next(c.module for key, c in target.programs.cache.items() if key[0] == "joint")
    data, doubled = (target.x, target.y), in_double(target).programs
    exact = doubled.joint(theta.double(), *(d.double() for d in data))[0]
    plain, precise = joint(theta, *data)[0], with_precise_prior(joint)(theta, *data)[0]
    assert plain.dtype == torch.float32
    assert precise.dtype == torch.float64
    assert float(exact) > 1e5
    assert abs(float(precise - exact)) < 1e-2
    # Constants are those of float32, so what counts is the difference between two points.

    def errors(prior: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        found = []
        for nudge in torch.linspace(1e-5, 1e-4, 10, dtype=torch.float32):
            wide = [doubled.joint(t.double(), *(d.double() for d in data))[0] for t in (theta, theta + nudge)]
            found.append(abs(float(prior(theta + nudge) - prior(theta)) - float(wide[1] - wide[0])))
        return found

    assert max(errors(lambda t: with_precise_prior(joint)(t, *data)[0])) < 1e-3
    assert max(errors(lambda t: joint(t, *data)[0])) > 1e-2


def test_a_sum_that_the_likelihood_reads_too_stays_float32() -> None:
    def joint(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shared = theta.square().sum()
        return theta.exp().sum() - 0.5 * shared, (theta * shared.view(1)).view(1, -1) @ theta

    theta = torch.linspace(0.1, 1.0, 5, dtype=torch.float32)
    module = with_precise_prior(capture(joint, theta).module)
    prior, likelihood = module(theta)
    sums = [n for n in module.graph.nodes if n.target is torch.ops.aten.sum.default]
    widened = [n.args[0].target is torch.ops.aten._to_copy.default for n in sums]
    assert sorted(widened) == [False, True]
    assert (prior.dtype, likelihood.dtype) == (torch.float64, torch.float32)
    expected = joint(theta)
    torch.testing.assert_close((prior.float(), likelihood), expected, rtol=1e-6, atol=1e-6)
