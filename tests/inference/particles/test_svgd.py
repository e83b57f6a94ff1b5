import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.particles import SVGD, svgd
from inference.particles.svgd import stein_direction
from inference.point import MAP

NOISE = 0.5


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def with_noise(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def data(num: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0]) + NOISE * torch.randn(num, generator=generator)


def on_standard_normal(start: Tensor, num_steps: int, step_size: float = 0.05) -> Tensor:
    theta = start.clone()
    optimiser = torch.optim.Adam([theta], lr=step_size, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    for _ in range(num_steps):
        theta.grad = -stein_direction(theta, -theta)
        optimiser.step()
        schedule.step()
    return theta


@pytest.mark.parametrize(
    ("num", "dim", "variance"), [(100, 1, 0.96), (100, 2, 0.92), (50, 10, 0.28), (20, 20, 0.15), (50, 100, 0.039)]
)
def test_marginal_variance_on_a_standard_normal_collapses_as_known(num: int, dim: int, variance: float) -> None:
    start = torch.randn(num, dim, generator=torch.Generator().manual_seed(0))
    theta = on_standard_normal(start, 1500)
    assert theta.var(0, unbiased=False).mean().item() == pytest.approx(variance, rel=0.05)
    assert theta.mean(0).abs().max() < 0.03


def test_the_mean_stays_exact_for_particles_placed_symmetrically() -> None:
    half = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    theta = on_standard_normal(torch.cat([half, -half]), 50)
    assert theta.mean(0).abs().max() < 1e-12


@pytest.mark.parametrize("num", [2, 5, 6])
def test_direction_equals_the_double_sum_of_the_paper(num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    theta, grads = torch.randn(num, 4, generator=generator), torch.randn(num, 4, generator=generator)
    pairs = [float((theta[i] - theta[j]).square().sum()) for i in range(num) for j in range(i + 1, num)]
    h = torch.tensor(pairs).quantile(0.5) / math.log(num)
    expected = torch.zeros_like(theta)
    for i in range(num):
        for j in range(num):
            moving = theta[j].clone().requires_grad_()
            kernel = torch.exp(-(moving - theta[i]).square().sum() / h)
            kernel.backward()
            assert moving.grad is not None
            expected[i] += (kernel.detach() * grads[j] + moving.grad) / num
    torch.testing.assert_close(stein_direction(theta, grads), expected, rtol=1e-10, atol=1e-12)


def test_a_fixed_bandwidth_is_h() -> None:
    theta = torch.tensor([[0.0], [1.0]])
    k = math.exp(-1 / 3)
    expected = torch.tensor([[-(2 / 3) * k], [(2 / 3) * k]]) / 2
    torch.testing.assert_close(stein_direction(theta, torch.zeros(2, 1), 3.0), expected, rtol=1e-12, atol=0)


def test_coinciding_particles_move_with_the_gradient() -> None:
    theta, grads = torch.ones(3, 2), torch.full((3, 2), 0.7)
    torch.testing.assert_close(stein_direction(theta, grads), grads, rtol=1e-12, atol=0)


def test_one_particle_is_map_with_the_jacobian() -> None:
    x, y = data()
    particle = SVGD(num_particles=1, num_steps=200).fit(with_noise, x, y).draws[0, 0]
    mode = MAP(num_steps=200, jacobian=True, polish=False).fit(with_noise, x, y).draws[0, 0]
    torch.testing.assert_close(particle, mode, rtol=0, atol=1e-9)


def test_linear_gaussian_posterior_in_two_dimensions_has_its_mean_and_nearly_its_variance() -> None:
    x, y = data()
    posterior = SVGD(num_particles=60, num_steps=1000, step_size=0.03).fit(linear, x, y)
    precision = x.T @ x / NOISE**2 + torch.eye(2)
    mean, variance = torch.linalg.solve(precision, x.T @ y / NOISE**2), precision.inverse().diagonal()
    draws = posterior.draws[0]
    assert posterior.draws.shape == (1, 60, 2)
    assert ((draws.mean(0) - mean).abs() / variance.sqrt()).max() < 0.05
    torch.testing.assert_close(draws.var(0, unbiased=False) / variance, torch.full((2,), 0.9), rtol=0, atol=0.08)


def test_temperature_scales_the_variance() -> None:
    x, y = data()
    cold, warm = (
        SVGD(num_particles=20, num_steps=600, step_size=0.03, temperature=t).fit(linear, x, y).draws[0].var(0).sum()
        for t in (1.0, 4.0)
    )
    assert (warm / cold).item() == pytest.approx(4.0, rel=0.05)


def test_gradients_taken_one_after_another_give_the_same_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    backend = SVGD(num_particles=5, num_steps=40, batch_size=8)
    together = backend.fit(with_noise, x, y).draws
    monkeypatch.setattr(svgd, "stacked", lambda *_: False)
    torch.testing.assert_close(together, backend.fit(with_noise, x, y).draws, rtol=1e-9, atol=1e-11)


def test_gradients_are_counted_for_every_particle() -> None:
    x, y = data(20)
    posterior = SVGD(num_particles=5, num_steps=4, batch_size=10).fit(linear, x, y)
    assert posterior.info.gradients == pytest.approx(5 * 4 * 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_particles": 0}, "`num_particles` must be an integer >= 1, got 0"),
        ({"bandwidth": 0.0}, "`bandwidth` must be > 0, got 0.0"),
        ({"bandwidth": "mean"}, "`bandwidth` must be > 0, got 'mean'"),
        ({"optimiser": "rmsprop"}, "`optimiser` must be one of"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVGD(**fields)  # type: ignore[arg-type]
