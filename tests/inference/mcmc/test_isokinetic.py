import math

import pytest
import torch
from torch import Tensor

from inference.mcmc.isokinetic import (
    Moving,
    isokinetic_step,
    largest_error,
    mclachlan,
    normalised,
    refreshment,
    turn,
)
from tests.inference.mcmc.lockstep import draw, microcanonical, tuning


def normal(theta: Tensor) -> Tensor:
    return -0.5 * theta.square().sum()


def normal_batch(theta: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * theta.square().sum(-1), -theta


def quartic_batch(theta: Tensor) -> tuple[Tensor, Tensor]:
    offset = theta - 0.3
    return -0.25 * offset.pow(4).sum(-1) - 0.5 * theta.square().sum(-1), -offset.pow(3) - theta


def moving(num: int = 5, dim: int = 4, seed: int = 0) -> Moving:
    generator = torch.Generator().manual_seed(seed)
    position = torch.randn(num, dim, generator=generator)
    direction = normalised(torch.randn(num, dim, generator=generator))
    value, gradient = quartic_batch(position)
    return Moving(position, direction, gradient, value)


@pytest.mark.parametrize(("step_size", "variance", "energy"), [(5.0, 0.997, 2.0e-6), (10.0, 0.987, 1.4e-4)])
def test_variance_and_energy_errors_on_a_normal_in_a_hundred_dimensions_are_the_known_ones(
    step_size: float, variance: float, energy: float
) -> None:
    starts = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    sampler = microcanonical(normal, starts, tuning(step_size, 10.0))
    draw(sampler, 50)
    draws, stats = draw(sampler, 800)
    # 12,800 steps of 100 coordinates, correlated over about four: a standard error of 0.0025.
    assert float(draws.square().mean()) == pytest.approx(variance, abs=0.01)
    assert float(stats["energy_change"].var()) / 100 == pytest.approx(energy, rel=0.12)
    assert float((sampler.moving.direction.norm(dim=-1) - 1).abs().max()) < 1e-6
    assert not bool(stats["diverging"].any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_keep_length_one(dtype: torch.dtype) -> None:
    starts = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampler = microcanonical(normal, starts, tuning(3.0, 5.0))
    draw(sampler, 200)
    assert sampler.moving.direction.dtype == dtype
    assert float((sampler.moving.direction.double().norm(dim=-1) - 1).abs().max()) < 1e-6


def test_a_turn_is_the_closed_form_in_hyperbolic_functions() -> None:
    state = moving()
    time = torch.linspace(0.1, 2.0, 5)
    found, kinetic = turn(state.direction, state.gradient, time)
    norm = state.gradient.norm(dim=-1)
    unit = state.gradient / norm[:, None]
    delta, cosine = time * norm / 3, (state.direction * unit).sum(-1)
    bottom = delta.cosh() + cosine * delta.sinh()
    top = state.direction + unit * (delta.sinh() + cosine * (delta.cosh() - 1))[:, None]
    torch.testing.assert_close(found, top / bottom[:, None], rtol=0, atol=1e-12)
    torch.testing.assert_close(kinetic, 3 * bottom.log(), rtol=0, atol=1e-12)


def test_a_turn_without_a_gradient_changes_nothing() -> None:
    state = moving()
    found, kinetic = turn(state.direction, torch.zeros_like(state.direction), torch.ones(5))
    torch.testing.assert_close(found, state.direction, rtol=0, atol=1e-15)
    torch.testing.assert_close(kinetic, torch.zeros(5), rtol=0, atol=1e-14)


def test_a_step_is_reversible_and_gives_its_energy_back() -> None:
    state, step_size = moving(), torch.linspace(0.1, 0.5, 5)
    scale = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) + 0.5
    there, error = mclachlan(state, step_size, scale, quartic_batch)
    turned_round = Moving(there.position, -there.direction, there.gradient, there.log_density)
    back, other = mclachlan(turned_round, step_size, scale, quartic_batch)
    torch.testing.assert_close(back.position, state.position, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.direction, -state.direction, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, -error, rtol=0, atol=1e-12)
    assert float(error.abs().min()) > 1e-8


def test_many_steps_are_reversible_in_time() -> None:
    state, step_size, scale = moving(), torch.full((5,), 0.05), torch.ones(5, 4)
    there = state
    for _ in range(100):
        there, _ = mclachlan(there, step_size, scale, quartic_batch)
    back = Moving(there.position, -there.direction, there.gradient, there.log_density)
    for _ in range(100):
        back, _ = mclachlan(back, step_size, scale, quartic_batch)
    assert float((there.position - state.position).norm(dim=-1).min()) > 0.5
    torch.testing.assert_close(back.position, state.position, rtol=0, atol=1e-8)


def test_halving_the_step_divides_the_energy_error_by_eight() -> None:
    state, scale = moving(), torch.ones(5, 4)
    errors = [mclachlan(state, torch.full((5,), e), scale, quartic_batch)[1] for e in (0.02, 0.01)]
    torch.testing.assert_close(errors[0] / errors[1], torch.full((5,), 8.0), rtol=0, atol=0.6)


def test_scales_are_a_change_of_coordinates() -> None:
    state, step_size = moving(), torch.full((5,), 0.3)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0]).expand(5, 4)

    def in_units(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = quartic_batch(z * scale)
        return value, gradient * scale

    found, error = mclachlan(state, step_size, scale, quartic_batch)
    units = Moving(state.position / scale, state.direction, state.gradient * scale, state.log_density)
    expected, expected_error = mclachlan(units, step_size, torch.ones(5, 4), in_units)
    torch.testing.assert_close(found.position, expected.position * scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(error, expected_error, rtol=0, atol=1e-12)


def test_energy_errors_of_float32_chains_agree_with_float64_at_large_energies() -> None:
    def far(theta: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * theta.double().square().sum(-1) - 1e6, -theta

    generator = torch.Generator().manual_seed(0)
    position = torch.randn(4, 200, generator=generator)
    direction = normalised(torch.randn(4, 200, generator=generator))
    errors = []
    for dtype in (torch.float32, torch.float64):
        value, gradient = far(position.to(dtype))
        state = Moving(position.to(dtype), direction.to(dtype), gradient, value)
        step_size = torch.full((4,), 9.0, dtype=dtype)
        errors.append(mclachlan(state, step_size, torch.ones(4, 200, dtype=dtype), far)[1])
    assert errors[0].dtype == torch.float64
    assert float(errors[1].abs().max()) > 1e-2
    torch.testing.assert_close(errors[0], errors[1], rtol=0, atol=3e-4)


def test_refreshment_forgets_the_direction_over_the_decoherence_length() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = normalised(torch.randn(50, 1000, generator=generator))
    time, length = torch.full((50,), 0.7), torch.full((50,), 2.0)
    nu = refreshment(time, length, 1000)
    after = normalised(direction + nu * torch.randn(50, 1000, generator=generator))
    assert float((direction * after).sum(-1).mean()) == pytest.approx(math.exp(-0.35), abs=0.01)


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    def wall(theta: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = normal_batch(theta)
        return torch.where(theta[:, 0] > 0.5, torch.nan, value), gradient

    position = torch.tensor([[0.4, 0.0, 0.0], [-3.0, 0.0, 0.0]])
    direction = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    value, gradient = wall(position)
    noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    settings = torch.full((2,), 1.0), torch.full((2,), 1e6), torch.ones(2, 3)
    new, error, taken = isokinetic_step(Moving(position, direction, gradient, value), *settings, noise, wall)
    assert taken.tolist() == [False, True]
    assert float(error[0]) == 0.0
    torch.testing.assert_close(new.position[0], position[0], rtol=0, atol=0)
    torch.testing.assert_close(new.direction.norm(dim=-1), torch.ones(2))
    assert not torch.equal(new.position[1], position[1])
    assert all(bool(torch.isfinite(t).all()) for t in new.tensors())


def test_the_largest_error_grows_with_the_root_of_the_dimension() -> None:
    assert largest_error(1) == largest_error(1000) == 1000.0
    assert largest_error(100_000) == pytest.approx(10_000.0)
