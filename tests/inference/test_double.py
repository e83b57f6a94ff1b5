"""The float64 twin of a float32 target."""

from __future__ import annotations

import pytest
import torch

from inference.backend import Run
from inference.data import map_tree
from inference.double import in_double
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
