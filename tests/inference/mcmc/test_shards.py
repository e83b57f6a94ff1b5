import math

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inference.double import in_double
from inference.errors import UnsupportedModelError
from inference.mcmc import HMC
from inference.mcmc.hamiltonian import precise_log_density
from inference.mcmc.integrators import leapfrog_program
from inference.mcmc.shards import (
    IntegratorName,
    ShardedDensity,
    accumulated,
    shard_gradients,
    shard_program,
    split_step,
)
from inference.target import Target, compile_target
from tests.cases import CASES
from tests.inference.mcmc.test_hamiltonian import data, linear
from tests.inference.test_double import wide_model

ONES = torch.ones(1, 3)


def quadratic_shards(num: int = 4) -> tuple[list, Tensor]:
    """Energies of random quadratic forms, one per shard, and the sum of their matrices."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(num, 3, 3, generator=generator)
    matrices = factors @ factors.mT / 3

    def of(matrix: Tensor):
        return lambda q: (-0.5 * ((q @ matrix) * q).sum(-1), -q @ matrix)

    return [of(m) for m in matrices], matrices.sum(0)


def energy(position: Tensor, momentum: Tensor, whole: Tensor) -> float:
    return float(0.5 * momentum.square().sum() + 0.5 * ((position @ whole) * position).sum())


def test_the_split_is_reversible_to_rounding() -> None:
    shards, _ = quadratic_shards()
    generator = torch.Generator().manual_seed(1)
    position, momentum = torch.randn(2, 1, 3, generator=generator)
    step_size = torch.full((1, 1), 0.1)
    state = position, momentum, shards[0](position)[1]
    for _ in range(20):
        *state, _ = split_step(*state, step_size, ONES, shards)
    back = state[0], -state[1], state[2]
    assert float((state[0] - position).abs().max()) > 0.1
    for _ in range(20):
        *back, _ = split_step(*back, step_size, ONES, shards)
    torch.testing.assert_close(back[0], position, rtol=0, atol=1e-13)
    torch.testing.assert_close(back[1], -momentum, rtol=0, atol=1e-13)


def test_one_split_step_is_reversible_to_fifteen_digits() -> None:
    shards, _ = quadratic_shards()
    position, momentum = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(1))
    step_size = torch.full((1, 1), 0.1)
    *there, _ = split_step(position, momentum, shards[0](position)[1], step_size, ONES, shards)
    *back, _ = split_step(there[0], -there[1], there[2], step_size, ONES, shards)
    torch.testing.assert_close(back[0], position, rtol=0, atol=2e-15)


def test_halving_the_step_divides_the_energy_error_of_the_split_by_four() -> None:
    shards, whole = quadratic_shards()
    position, momentum = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(2))
    errors = []
    for step_size in (0.2, 0.1, 0.05):
        state = position, momentum, shards[0](position)[1]
        for _ in range(round(1.0 / step_size)):
            *state, _ = split_step(*state, torch.full((1, 1), step_size), ONES, shards)
        errors.append(energy(state[0], state[1], whole) - energy(position, momentum, whole))
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.5)
    assert errors[1] / errors[2] == pytest.approx(4.0, abs=0.2)


def test_the_split_preserves_volume() -> None:
    shards, _ = quadratic_shards(3)

    def step(state: Tensor) -> Tensor:
        position, momentum = state[None, :3], state[None, 3:]
        out = split_step(position, momentum, shards[0](position)[1], torch.full((1, 1), 0.3), ONES, shards)
        return torch.cat([out[0][0], out[1][0]])

    jacobian = torch.autograd.functional.jacobian(step, torch.randn(6, generator=torch.Generator().manual_seed(0)))
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-12)


def target_and_points(name: str = "broadcasting", num: int = 3) -> tuple[Target, Tensor]:
    case = next(c for c in CASES if c.name == name)
    target = compile_target(case.model(), case.x, case.y).tempered(2.0, 3.0)
    return target, 0.3 * torch.randn(num, target.dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["broadcasting", "dict_inputs", "simplex"])
def test_shards_add_up_to_the_density_of_all_the_data(name: str) -> None:
    target, thetas = target_and_points(name)
    density = ShardedDensity(target, 5)
    value, grad = accumulated(shard_gradients(density, 3, target.x, target.y))(thetas)
    whole, data = precise_log_density(target)
    for c, theta in enumerate(thetas):
        expected_grad, expected = torch.func.grad_and_value(whole)(theta, *data)
        assert float(value[c]) == pytest.approx(float(expected), rel=1e-12)
        torch.testing.assert_close(grad[c], expected_grad, rtol=1e-10, atol=1e-10)
        assert float(density(theta, *density.data)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("integrator", ["leapfrog", "split"])
def test_shards_sum_their_priors_in_float64(integrator: IntegratorName) -> None:
    x = torch.ones(7, dtype=torch.float32)
    target = compile_target(wide_model, x, x)
    density, twin = ShardedDensity(target, 3, integrator), in_double(target)
    theta = 0.01 * torch.randn(target.dim, generator=torch.Generator().manual_seed(0)).float()
    points = torch.stack([theta, *(theta + nudge for nudge in torch.linspace(1e-5, 1e-4, 10, dtype=torch.float32))])
    exact = torch.stack([twin.log_density(p) for p in points.double()])
    # Constants are those of float32, so what counts is the difference between two points.
    expected = exact[1:] - exact[0]
    value, grad = accumulated(shard_gradients(density, len(points), x, x))(points)
    alone = torch.stack([density(p, *density.data) for p in points])
    for found in (value, alone):
        assert found.dtype == torch.float64
        assert float((found[1:] - found[0] - expected).abs().max()) < 1e-3
    assert grad.dtype == torch.float32
    single = torch.stack([target.log_density(p) for p in points])
    assert float((single[1:] - single[0] - expected).abs().max()) > 1e-2
    if integrator == "split":
        block, mass = torch.zeros(4, 1, target.dim, dtype=torch.float32), torch.ones(1, target.dim, dtype=torch.float32)
        block[0], block[2] = theta, shard_gradients(density, 1, x, x)[0](theta[None])[1]
        rows, _, scalars = shard_program(density, block, mass)(
            block, torch.tensor([1e-6]).float(), mass, mass.new_zeros(2, 1, 0, target.dim)
        )
        moved = twin.log_density(rows[0, 0].double()) - exact[0]
        assert abs(float(scalars[0, 0] - alone[0] - moved)) < 1e-3


@pytest.mark.parametrize("num_shards", [1, 2, 5, 12])
def test_shards_cover_all_rows_once(num_shards: int) -> None:
    target, _ = target_and_points()
    density = ShardedDensity(target, num_shards)
    rows = [r for shard in range(num_shards) for r in range(target.num_data)[density.rows(shard)]]
    assert rows == list(range(target.num_data))


def block_of(target: Target, thetas: Tensor) -> Tensor:
    whole, data = precise_log_density(target)
    block = torch.zeros(4, *thetas.shape)
    block[0] = thetas
    block[1] = torch.randn(thetas.shape, generator=torch.Generator().manual_seed(1))
    block[2] = torch.stack([torch.func.grad(whole)(t, *data) for t in thetas])
    return block


def test_accumulated_gradients_make_the_same_leapfrog() -> None:
    target, thetas = target_and_points()
    block, mass = block_of(target, thetas), torch.rand(3, target.dim) + 0.5
    whole, data = precise_log_density(target)
    steps, slots = torch.tensor([0.1, -0.2, 0.05]), torch.zeros(2, 3, 0, target.dim)
    expected = leapfrog_program(whole, block, mass, data=data)(block, steps, mass, slots)
    found = shard_program(ShardedDensity(target, 4), block, mass)(block, steps, mass, slots)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_sharded_leapfrog_holds_no_tensor_of_all_the_data() -> None:
    x, y = data(64)
    target = compile_target(linear, x, y)
    density = ShardedDensity(target, 8)
    program = shard_program(density, torch.zeros(4, 1, 2), torch.ones(1, 2))
    values = [n.meta["val"] for n in program.captured.module.graph.nodes if n.op == "call_function"]
    sizes = [v.shape[0] for v in pytree.tree_leaves(values) if isinstance(v, Tensor) and v.dim() > 0]
    assert 8 in sizes
    assert max(sizes) <= 8


def test_the_split_program_is_the_plain_split() -> None:
    target, thetas = target_and_points()
    density = ShardedDensity(target, 3, "split")
    shards = shard_gradients(density, 3, target.x, target.y)
    block, mass = block_of(target, thetas), torch.rand(3, target.dim) + 0.5
    block[2] = shards[0](thetas)[1]
    steps = torch.tensor([0.1, -0.2, 0.05])
    rows, _, scalars = shard_program(density, block, mass)(block, steps, mass, torch.zeros(2, 3, 0, target.dim))
    position, momentum, gradient, value = split_step(*block[:3], steps[:, None], mass, shards)
    torch.testing.assert_close(rows[:3], torch.stack([position, momentum, gradient]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scalars[:, 0], value, rtol=1e-12, atol=0)
    whole, data = precise_log_density(target)
    torch.testing.assert_close(value, torch.stack([whole(t, *data) for t in position]), rtol=1e-12, atol=0)


def test_energy_errors_of_the_split_at_stationarity_have_the_mean_of_an_exact_sampler() -> None:
    shards, whole = quadratic_shards()
    generator = torch.Generator().manual_seed(3)
    root = torch.linalg.cholesky(torch.linalg.inv(whole))
    position, momentum = torch.randn(2, 4000, 3, generator=generator)
    position = position @ root.mT
    state = position, momentum, shards[0](position)[1]
    for _ in range(5):
        *state, _ = split_step(*state, torch.full((4000, 1), 0.35), torch.ones(4000, 3), shards)

    def energies(q: Tensor, p: Tensor) -> Tensor:
        return 0.5 * p.square().sum(-1) + 0.5 * ((q @ whole) * q).sum(-1)

    weights = torch.exp(energies(position, momentum) - energies(state[0], state[1]))
    error = float(weights.std()) / math.sqrt(len(weights))
    assert 0.001 < error < 0.1
    assert abs(float(weights.mean()) - 1) < 4 * error


def test_more_shards_than_data_are_refused_before_any_sampling() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="`num_shards` must be <= the number of data 12, got 13"):
        HMC(num_shards=13).fit(linear, x, y)


def test_latents_per_datum_cannot_be_sharded() -> None:
    case = next(c for c in CASES if c.local)
    with pytest.raises(UnsupportedModelError, match="'effect' has one value per datum"):
        HMC(num_shards=3, num_samples=4, warmup_steps=1, num_chains=2, compile=False).fit(case.model(), case.x, case.y)
