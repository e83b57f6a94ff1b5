import math

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, jacrev

from inference.mcmc.integrators import LogDensity, leapfrog, leapfrog_program, velocity
from tests.inference.mcmc.sampling import CorrelatedGaussian


def quartic(theta: Tensor) -> Tensor:
    return -0.25 * (theta**4).sum() - 0.5 * (theta[0] - theta[1]) ** 2


def value_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
    gradient, value = grad_and_value(quartic)(theta)
    return value, gradient


def steps(
    position: Tensor, momentum: Tensor, step_size: float, num: int, inverse_mass: Tensor
) -> tuple[Tensor, Tensor]:
    gradient = value_and_grad(position)[1]
    for _ in range(num):
        position, momentum, gradient, _ = leapfrog(
            position, momentum, gradient, torch.tensor(step_size), inverse_mass, value_and_grad
        )
    return position, momentum


DENSE = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
DIAGONAL = torch.tensor([0.5, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("inverse_mass", [DIAGONAL, DENSE], ids=["diagonal", "dense"])
def test_leapfrog_is_reversible(inverse_mass: Tensor) -> None:
    start, momentum = torch.tensor([0.7, -1.1]), torch.tensor([0.4, 1.3])
    end, end_momentum = steps(start, momentum, 0.05, 200, inverse_mass)
    assert (end - start).norm() > 0.1
    back, back_momentum = steps(end, -end_momentum, 0.05, 200, inverse_mass)
    torch.testing.assert_close(back, start, rtol=0, atol=1e-8)
    torch.testing.assert_close(back_momentum, -momentum, rtol=0, atol=1e-8)
    same, _ = steps(end, end_momentum, -0.05, 200, inverse_mass)
    torch.testing.assert_close(same, start, rtol=0, atol=1e-8)


@pytest.mark.parametrize("inverse_mass", [DIAGONAL, DENSE], ids=["diagonal", "dense"])
def test_leapfrog_preserves_volume_and_is_symplectic(inverse_mass: Tensor) -> None:
    def flow(state: Tensor) -> Tensor:
        return torch.cat(steps(state[:2], state[2:], 0.2, 5, inverse_mass))

    jacobian = jacrev(flow)(torch.tensor([0.7, -1.1, 0.4, 1.3]))
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-10)
    zero, one = torch.zeros(2, 2), torch.eye(2)
    form = torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])
    torch.testing.assert_close(jacobian.T @ form @ jacobian, form, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("step_size", "lam"), [(0.3, 1.0), (0.9, 4.0), (0.05, 100.0)])
def test_leapfrog_conserves_the_modified_energy_of_an_oscillator(step_size: float, lam: float) -> None:
    def oscillator(theta: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * lam * theta.square().sum(), -lam * theta

    def modified(position: Tensor, momentum: Tensor) -> float:
        return float(0.5 * momentum**2 + 0.5 * lam * (1 - step_size**2 * lam / 4) * position**2)

    position, momentum, one = torch.tensor([1.0]), torch.tensor([0.5]), torch.ones(1)
    gradient, before = oscillator(position)[1], modified(position, momentum)
    for _ in range(1000):
        position, momentum, gradient, _ = leapfrog(
            position, momentum, gradient, torch.tensor(step_size), one, oscillator
        )
        assert abs(modified(position, momentum) - before) < 1e-9 * max(1.0, before)


@pytest.mark.parametrize(("factor", "stable"), [(1.99, True), (2.01, False)])
def test_leapfrog_is_stable_below_two_over_the_frequency(factor: float, stable: bool) -> None:
    lam = 9.0
    position, momentum, one = torch.tensor([1.0]), torch.tensor([0.5]), torch.ones(1)
    gradient = -lam * position
    for _ in range(500):
        position, momentum, gradient, _ = leapfrog(
            position, momentum, gradient, torch.tensor(factor / lam**0.5), one, lambda q: (q.sum(), -lam * q)
        )
    assert (abs(float(position)) < 100) == stable


def test_energy_error_falls_fourfold_when_the_step_is_halved() -> None:
    def error(step_size: float) -> float:
        start, momentum = torch.tensor([0.7, -1.1]), torch.tensor([0.4, 1.3])
        end, end_momentum = steps(start, momentum, step_size, round(1.0 / step_size), torch.ones(2))
        before, after = 0.5 * momentum @ momentum - quartic(start), 0.5 * end_momentum @ end_momentum - quartic(end)
        return float(after - before)

    assert error(0.02) / error(0.01) == pytest.approx(4.0, rel=0.02)
    assert error(0.01) / error(0.005) == pytest.approx(4.0, rel=0.01)


def test_mean_of_exp_minus_energy_error_is_one_at_stationarity() -> None:
    gaussian, num = CorrelatedGaussian(), 4000
    block = torch.zeros(4, num, 10)
    block[0] = gaussian.sample(num)
    block[1] = torch.randn(num, 10, generator=torch.Generator().manual_seed(5))
    block[2] = -(block[0] - gaussian.loc) @ gaussian.precision
    before = 0.5 * block[1].square().sum(1) + 0.5 * ((block[0] - gaussian.loc) * -block[2]).sum(1)
    ones, slots = torch.ones(num, 10), torch.zeros(2, num, 0, 10)
    program = leapfrog_program(gaussian.log_density, block, ones)
    for _ in range(7):
        block, _, scalars = program(block, torch.full((num,), 0.5), ones, slots)
    weights = torch.exp(before - (scalars[:, 1] - scalars[:, 0]))
    error = float(weights.std()) / math.sqrt(num)
    assert 0.005 < error < 0.1
    assert abs(float(weights.mean()) - 1) < 4 * error


def test_program_steps_every_chain_like_the_plain_leapfrog() -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(4, 3, 2, generator=generator)
    for c in range(3):
        block[2, c] = value_and_grad(block[0, c])[1]
    step_size, inverse_mass = torch.tensor([0.1, -0.2, 0.0]), torch.rand(3, 2, generator=generator) + 0.5
    program = leapfrog_program(quartic, block, inverse_mass)
    new, pair, scalars = program(block, step_size, inverse_mass, torch.zeros(2, 3, 0, 2))
    for c in range(3):
        position, momentum, gradient, value = leapfrog(
            block[0, c], block[1, c], block[2, c], step_size[c], inverse_mass[c], value_and_grad
        )
        expected = torch.stack([position, momentum, gradient, block[3, c] + momentum])
        torch.testing.assert_close(new[:, c], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            pair[:, c], torch.stack([inverse_mass[c] * momentum, block[3, c]]), rtol=0, atol=1e-12
        )
        kinetic = 0.5 * momentum @ (inverse_mass[c] * momentum)
        torch.testing.assert_close(scalars[c, :2], torch.stack([value, kinetic]), rtol=0, atol=1e-12)
    torch.testing.assert_close(new[0, 2], block[0, 2], rtol=0, atol=0)


def test_turn_bits_agree_with_dot_products() -> None:
    generator = torch.Generator().manual_seed(3)
    num_slots, block = 6, torch.randn(4, 5, 2, generator=generator)
    inverse_mass, slots = torch.ones(5, 2), torch.randn(2, 5, num_slots, 2, generator=generator)
    program = leapfrog_program(quartic, block, inverse_mass, num_slots=num_slots)
    new, _, scalars = program(block, torch.full((5,), 0.1), inverse_mass, slots)
    seen = set()
    for c in range(5):
        for k in range(num_slots):
            rho = new[3, c] - slots[1, c, k]
            turned = bool(slots[0, c, k] @ rho <= 0) or bool(new[1, c] @ rho <= 0)
            assert bool(int(scalars[c, 2]) >> k & 1) == turned
            seen.add(turned)
    assert seen == {True, False}


def test_energies_are_float64_for_a_float32_chain() -> None:
    block = torch.randn(4, 2, 3, dtype=torch.float32)
    program = leapfrog_program(lambda q: -0.5 * q.double().square().sum(), block, torch.ones(2, 3, dtype=torch.float32))
    new, _, scalars = program(
        block,
        torch.full((2,), 0.1, dtype=torch.float32),
        torch.ones(2, 3, dtype=torch.float32),
        block.new_zeros(2, 2, 0, 3),
    )
    assert new.dtype == torch.float32
    assert scalars.dtype == torch.float64
    torch.testing.assert_close(scalars[:, 1], 0.5 * new[1].double().square().sum(-1), rtol=1e-12, atol=0)


def test_velocity_multiplies_by_the_inverse_mass() -> None:
    momentum = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(velocity(DIAGONAL, momentum), torch.tensor([0.5, 4.0]))
    torch.testing.assert_close(velocity(DENSE, momentum), DENSE @ momentum)


def outputs(theta: Tensor, x: Tensor, hidden: int) -> Tensor:
    first, bias, second, last = theta.split([8 * hidden, hidden, hidden, 1])
    return torch.tanh(x @ first.view(hidden, 8).T / 8**0.5 + bias) @ second / hidden**0.5 + last


def network(x: Tensor, hidden: int) -> LogDensity:
    """Log density of an 8-H-1 network with noise 0.1 and N(0, 1) priors at (theta, y), sums in float64."""

    def log_density(both: Tensor) -> Tensor:
        theta, y = both.split([10 * hidden + 1, len(x)])
        likelihood = -50.0 * (y - outputs(theta, x, hidden)).square()
        return likelihood.double().sum() - 0.5 * theta.double().square().sum()

    return log_density


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compiler)])
def test_float32_energies_of_a_network_keep_the_mean_of_exp_minus_energy_error(compile: bool) -> None:
    # A theta from the prior with data drawn from it is a draw of the posterior given these data, so every chain begins
    # at stationarity; its data stand behind theta and have no velocity.
    generator, num, hidden = torch.Generator().manual_seed(0), 64, 10
    x, dim = torch.randn(691, 8, generator=generator), 10 * hidden + 1
    theta = torch.randn(num, dim, generator=generator)
    y = torch.stack([outputs(t, x, hidden) for t in theta]) + 0.1 * torch.randn(num, 691, generator=generator)
    block = torch.zeros(4, num, dim + 691, dtype=torch.float32)
    block[0] = torch.cat([theta, y], 1)
    inverse_mass = torch.zeros_like(block[0])
    inverse_mass[:, :dim] = 1.0
    slots = block.new_zeros(2, num, 0, dim + 691)
    program = leapfrog_program(network(x.to(torch.float32), hidden), block, inverse_mass, compile=compile)
    step_size = torch.full((num,), 0.004, dtype=torch.float32)
    block, _, scalars = program(block, 0.0 * step_size, inverse_mass, slots)
    errors = []
    for _ in range(20):
        before = block.clone()
        before[1] = torch.randn(num, dim + 691, generator=generator)
        start = 0.5 * (inverse_mass * before[1].square()).double().sum(1) - scalars[:, 0]
        block, after = before, scalars
        for _ in range(8):
            block, _, after = program(block, step_size, inverse_mass, slots)
        errors.append(after[:, 1] - after[:, 0] - start)
        accepted = torch.rand(num, generator=generator).log() < -errors[-1]
        block = torch.where(accepted[:, None], block, before)
        scalars = torch.where(accepted[:, None], after, scalars)
    weights = torch.exp(-torch.stack(errors)).mean(0)  # (C,)
    deviation = float(weights.std()) / num**0.5
    assert 1e-4 < deviation < 0.05
    assert abs(float(weights.mean()) - 1) < 4 * deviation


def test_differences_of_float32_energies_are_right_to_a_thousandth_of_a_nat() -> None:
    generator = torch.Generator().manual_seed(0)
    x, both = torch.randn(691, 8, generator=generator), torch.randn(3, 501 + 691, generator=generator)
    both[:, :501] *= 0.3
    found = []
    for dtype in (torch.float32, torch.float64):
        # the same numbers in both, as float32 holds them
        start, given = both.to(torch.float32).to(dtype), x.to(torch.float32).to(dtype)
        block, none = torch.zeros(4, 3, 1192, dtype=dtype), torch.zeros(2, 3, 0, 1192, dtype=dtype)
        program = leapfrog_program(network(given, 50), block, torch.ones_like(start))
        values = []
        for nudge in (0.0, 2.0**-10):
            block[0] = start
            block[0, :, 0] += nudge
            values.append(program(block, torch.zeros(3, dtype=dtype), torch.ones_like(start), none)[2][:, 0])
        found.append(values[1] - values[0])
    assert float(values[0].abs().min()) > 1e4
    assert float(found[1].abs().min()) > 5e-3
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)
