import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.func import grad

from inference.mcmc.integrators import leapfrog_program
from inference.mcmc.nuts import NUTSKernel, plan
from tests.inference.mcmc.sampling import HMC, NUTS, CorrelatedGaussian, draws_of, ensemble, transitions, z_scores


def intervals(depth: int) -> set[tuple[int, int]]:
    """Every pair of leaves that a recursive sampler checks inside one subtree of 2^depth leaves."""
    pairs = set()
    for level in range(1, depth + 1):
        for start in range(0, 2**depth, 2**level):
            end, middle = start + 2**level - 1, start + 2 ** (level - 1)
            pairs |= {(start, end), (start, middle), (middle - 1, end)}
    return {(a, b) for a, b in pairs if a != b}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 9])
def test_plan_checks_the_pairs_of_the_recursive_sampler(depth: int) -> None:
    levels = 9
    stored: dict[int, int] = {}
    checked = set()
    for leaf in range(2**depth):
        bits, slot = plan(leaf, levels)
        assert bits < 1 << 2 * levels
        checked |= {(stored[k], leaf) for k in range(2 * levels) if bits >> k & 1}
        if leaf < 2**depth - 1:
            assert slot < 2 * levels
            stored[slot] = leaf
    # Neighbours are checked from both sides in the extra rule: one check serves.
    assert checked == intervals(depth)


def turned(points: list[tuple[Tensor, Tensor]], a: int, b: int) -> bool:
    rho = torch.stack([p for p, _ in points[a : b + 1]]).sum(0)
    return bool(points[a][1] @ rho <= 0) or bool(points[b][1] @ rho <= 0)


def invalid(points: list[tuple[Tensor, Tensor]], a: int, b: int) -> bool:
    """Whether the subtree of leaves a..b has turned somewhere, by Stan's recursion."""
    if a == b:
        return False
    middle = (a + b + 1) // 2
    if invalid(points, a, middle - 1) or invalid(points, middle, b):
        return True
    return turned(points, a, b) or turned(points, a, middle) or turned(points, middle - 1, b)


@pytest.mark.parametrize("step_size", [0.005, -0.005, 0.05, 0.11, 0.23, 0.4, -0.15])
def test_subtree_ends_where_the_recursion_says(step_size: float) -> None:
    gaussian, depth, levels = CorrelatedGaussian(3), 5, 6
    generator = torch.Generator().manual_seed(2)
    block = torch.zeros(4, 1, 3)
    block[0, 0], block[1, 0] = gaussian.sample(1)[0], torch.randn(3, generator=generator)
    block[2, 0] = grad(gaussian.log_density)(block[0, 0])
    inverse_mass, slots = torch.tensor([[0.5, 1.0, 2.0]]), torch.zeros(2, 1, 2 * levels, 3)
    program = leapfrog_program(gaussian.log_density, block, inverse_mass, num_slots=2 * levels)
    points, stopped = [], None
    for leaf in range(2**depth):
        block, pair, scalars = program(block, torch.tensor([step_size]), inverse_mass, slots)
        points.append((block[1, 0], pair[0, 0]))
        bits, slot = plan(leaf, levels)
        if stopped is None and int(scalars[0, 2]) & bits:
            stopped = leaf
        if leaf < 2**depth - 1:
            slots[:, 0, slot] = pair[:, 0]
    assert invalid(points, 0, 2**depth - 1) == (stopped is not None)
    assert (stopped is None) == (abs(step_size) == 0.005)


@pytest.mark.parametrize("mass_matrix", ["diagonal", "dense", "identity"])
def test_nuts_has_the_moments_of_a_correlated_gaussian(mass_matrix: str) -> None:
    gaussian = CorrelatedGaussian()
    draws = draws_of(
        gaussian.log_density, torch.zeros(8, 10), num_samples=200, warmup_steps=150, mass_matrix=mass_matrix
    )
    assert np.abs(z_scores(draws, gaussian.loc)).max() < 4
    squares = (draws - gaussian.loc).square()
    assert np.abs(z_scores(squares, gaussian.covariance.diagonal())).max() < 4
    cross = (draws - gaussian.loc)[..., :1] * (draws - gaussian.loc)[..., 1:]
    assert np.abs(z_scores(cross, gaussian.covariance[0, 1:])).max() < 4


def banana(theta: Tensor) -> Tensor:
    return -0.5 * theta[0] ** 2 - 0.5 * (theta[1] - theta[0] ** 2) ** 2


def test_nuts_has_the_moments_of_a_banana() -> None:
    # y = x^2 + e, e ~ N(0, 1): light-tailed functions, and a step that is stable in the tails too.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 1, generator=generator)
    starts = torch.cat([x, x**2 + torch.randn(16, 1, generator=generator)], 1)
    draws = draws_of(
        banana, starts, num_samples=200, warmup_steps=0, step_size=0.25, adapt_step_size=False, mass_matrix="identity"
    )
    x, y = draws[..., 0], draws[..., 1]
    functions = torch.stack([x, x**2, y, y - x**2, (y - x**2) ** 2, (x.abs() < 1).double(), (x.abs() < 2).double()], -1)
    inside = [float(stats.norm.cdf(k) - stats.norm.cdf(-k)) for k in (1, 2)]
    assert np.abs(z_scores(functions, torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, *inside]))).max() < 4


def student(theta: Tensor) -> Tensor:
    return -3.0 * torch.log1p(theta[0] ** 2 / 5.0) - (0.25 * theta[1] ** 4 - theta[1] ** 2)


def test_nuts_agrees_with_quadrature_on_heavy_tails_and_a_double_well() -> None:
    draws = draws_of(student, torch.zeros(12, 2), num_samples=250, warmup_steps=150)

    def moment(density: Callable[[float], float], function: Callable[[float], float]) -> float:
        top = integrate.quad(lambda t: density(t) * function(t), -60, 60, limit=400, points=[-1, 0, 1])[0]
        return top / integrate.quad(density, -60, 60, limit=400, points=[-1, 0, 1])[0]

    def well(t: float) -> float:
        return math.exp(-min(0.25 * t**4 - t**2, 700.0))

    def tail(t: float) -> float:
        return (1 + t * t / 5) ** -3.0

    got = torch.stack(
        [
            draws[..., 0].abs(),
            (draws[..., 0].abs() > 3).double(),
            draws[..., 1],
            draws[..., 1] ** 2,
            draws[..., 1] ** 4,
        ],
        -1,
    )
    expected = [moment(tail, abs), moment(tail, lambda t: float(abs(t) > 3)), 0.0]
    expected += [moment(well, lambda t: t**2), moment(well, lambda t: t**4)]
    assert np.abs(z_scores(got, torch.tensor(expected))).max() < 4


def recursive_nuts(
    log_density: Callable[[Tensor], Tensor], start: Tensor, step_size: float, num: int, seed: int
) -> Tensor:
    """The slow twin: a recursive multinomial NUTS for one chain, unit mass, written for reading."""
    rng = np.random.default_rng(seed)
    gradient = grad(log_density)

    def leap(q: Tensor, p: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        p = p + 0.5 * sign * step_size * gradient(q)
        q = q + sign * step_size * p
        return q, p + 0.5 * sign * step_size * gradient(q)

    def subtree(q: Tensor, p: Tensor, sign: int, depth: int, h0: float) -> tuple[list, Tensor, float, bool]:
        if depth == 0:
            q, p = leap(q, p, sign)
            return [(q, p)], q, float(log_density(q) - 0.5 * p @ p) + h0, True
        first, choice, weight, valid = subtree(q, p, sign, depth - 1, h0)
        if not valid:
            return first, choice, weight, False
        second, other, more, valid = subtree(*first[-1], sign, depth - 1, h0)
        total = float(np.logaddexp(weight, more))
        if valid and math.log(rng.random()) < more - total:
            choice = other
        points = first + second
        momenta = [(p, p) for _, p in points]
        half = len(first)
        valid = valid and not turned(momenta, 0, len(points) - 1)
        valid = valid and not turned(momenta, 0, half) and not turned(momenta, half - 1, len(points) - 1)
        return points, choice, total, valid

    q, draws = start, []
    for _ in range(num):
        p = torch.as_tensor(rng.standard_normal(q.shape[0]))
        h0 = float(0.5 * p @ p - log_density(q))
        points, weight, current = [(q, p)], 0.0, q
        for depth in range(8):
            sign = 1 if rng.random() < 0.5 else -1
            grown, choice, more, valid = subtree(*points[-1 if sign > 0 else 0], sign, depth, h0)
            if not valid:
                break
            if math.log(rng.random()) < more - weight:
                current = choice
            weight = float(np.logaddexp(weight, more))
            half, points = len(points), points + grown if sign > 0 else grown[::-1] + points
            split = half if sign > 0 else len(grown)
            momenta = [(p, p) for _, p in points]
            whole = turned(momenta, 0, len(points) - 1)
            if whole or turned(momenta, 0, split) or turned(momenta, split - 1, len(points) - 1):
                break
        q = current
        draws.append(q)
    return torch.stack(draws)


def test_nuts_agrees_with_a_recursive_twin() -> None:
    slow = recursive_nuts(banana, torch.zeros(2), 0.3, 300, seed=1)[None]
    running = ensemble(
        banana,
        torch.zeros(4, 2),
        num_samples=300,
        warmup_steps=20,
        step_size=0.3,
        adapt_step_size=False,
        mass_matrix="identity",
    )
    running.run()
    fast = torch.stack([r.draws for r in running.records])
    for function in (lambda d: d, lambda d: d**2):
        a, b = function(slow), function(fast)
        zero = torch.zeros(2)
        error_a = (a.mean((0, 1)).numpy() / z_scores(a, zero)) ** 2
        error_b = (b.mean((0, 1)).numpy() / z_scores(b, zero)) ** 2
        difference = (a.mean((0, 1)) - b.mean((0, 1))).numpy()
        assert np.abs(difference / np.sqrt(error_a + error_b)).max() < 4


def test_nuts_and_hmc_agree() -> None:
    options = {"num_samples": 150, "warmup_steps": 150}
    a = draws_of(student, torch.zeros(8, 2), NUTS, **options)
    b = draws_of(student, torch.zeros(8, 2), HMC, target_accept=0.651, **options)
    for function in (lambda d: d, lambda d: d.abs()):
        x, y = function(a), function(b)
        zero = torch.zeros(2)
        errors = (x.mean((0, 1)).numpy() / z_scores(x, zero)) ** 2 + (y.mean((0, 1)).numpy() / z_scores(y, zero)) ** 2
        assert np.abs((x.mean((0, 1)) - y.mean((0, 1))).numpy() / np.sqrt(errors)).max() < 4


@pytest.mark.parametrize("max_tree_depth", [1, 2, 5])
def test_trees_stop_at_the_maximal_depth(max_tree_depth: int) -> None:
    running = ensemble(
        lambda q: -0.5 * q.square().sum(),
        torch.ones(2, 3),
        NUTSKernel(max_tree_depth),
        num_samples=20,
        warmup_steps=0,
        step_size=1e-3,
        adapt_step_size=False,
    )
    running.run()
    for record in running.records:
        assert {t.num_steps for t in transitions(record)} == {2**max_tree_depth - 1}
        assert {t.tree_depth for t in transitions(record)} == {max_tree_depth}


def test_a_shallow_tree_still_targets_the_right_distribution() -> None:
    gaussian = CorrelatedGaussian(3)
    draws = draws_of(gaussian.log_density, gaussian.sample(8), NUTSKernel(2), warmup_steps=150)
    assert np.abs(z_scores(draws, gaussian.loc)).max() < 4
    assert np.abs(z_scores((draws - gaussian.loc).square(), gaussian.covariance.diagonal())).max() < 4


def test_energy_is_that_of_the_accepted_point() -> None:
    running = ensemble(lambda q: -0.5 * q.square().sum(), torch.ones(2, 20), num_samples=200, warmup_steps=100)
    running.run()
    for record in running.records:
        kinetic = torch.tensor([t.energy + lp for t, lp in zip(transitions(record), record.stats["lp"], strict=True)])
        assert float(kinetic.min()) > 0
        assert float(kinetic.mean()) == pytest.approx(10.0, abs=2.0)
        expected = -0.5 * record.draws.square().sum(1)
        torch.testing.assert_close(torch.tensor(record.stats["lp"]), expected, rtol=0, atol=1e-10)
