import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.point import MAP

PRIOR_SCALE, NOISE = 1.5, 0.5


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), PRIOR_SCALE).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def gamma_prior(x: Tensor, y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.0 * rate * x, 1.0), obs=y)


def data(num: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 3, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(num, generator=generator)


def ridge(x: Tensor, y: Tensor, noise_variance: float = NOISE**2) -> Tensor:
    return torch.linalg.solve(x.T @ x + noise_variance / PRIOR_SCALE**2 * torch.eye(3), x.T @ y)


def test_map_of_a_linear_gaussian_model_is_the_ridge_solution() -> None:
    x, y = data()
    posterior = MAP(num_steps=300).fit(linear, x, y)
    assert posterior.draws.shape == (1, 1, 3)
    torch.testing.assert_close(posterior.draws[0, 0], ridge(x, y), rtol=0, atol=1e-6)


def test_minibatches_reach_the_ridge_solution_up_to_their_noise() -> None:
    x, y = data()
    posterior = MAP(num_steps=3000, batch_size=20, step_size=0.02).fit(linear, x, y)
    torch.testing.assert_close(posterior.draws[0, 0], ridge(x, y), rtol=0, atol=5e-3)


def test_sgd_reaches_the_ridge_solution_without_polishing() -> None:
    x, y = data()
    posterior = MAP(num_steps=1000, optimiser="sgd", step_size=0.02, polish=False).fit(linear, x, y)
    torch.testing.assert_close(posterior.draws[0, 0], ridge(x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("jacobian", "mode"), [(False, 2.0), (True, 3.0)])
def test_mode_of_a_gamma_site_depends_on_the_jacobian(jacobian: bool, mode: float) -> None:
    zeros = torch.zeros(2)
    posterior = MAP(jacobian=jacobian, num_steps=300).fit(gamma_prior, zeros, zeros)
    assert posterior.sample_sites(1)["rate"].item() == pytest.approx(mode, abs=1e-5)


def test_likelihood_temperature_acts_as_a_larger_noise_and_full_temperature_not_at_all() -> None:
    x, y = data()
    cold = MAP(num_steps=300, likelihood_temperature=4.0).fit(linear, x, y).draws[0, 0]
    torch.testing.assert_close(cold, ridge(x, y, 4 * NOISE**2), rtol=0, atol=1e-6)
    full = MAP(num_steps=300, temperature=0.1).fit(linear, x, y).draws[0, 0]
    torch.testing.assert_close(full, ridge(x, y), rtol=0, atol=1e-6)


def test_the_best_of_several_restarts_is_kept() -> None:
    def two_modes(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.5, 1.0))  # modes near -1 and 1, the second is deeper
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * w * torch.ones_like(x), 0.3), obs=y)

    ones = torch.ones(5)
    init = torch.tensor([[-1.1], [1.1]])
    posterior = MAP(num_restarts=2, num_steps=200).fit(two_modes, ones, ones, init=init)
    assert posterior.draws.item() > 0.9
    assert MAP(num_steps=200).fit(two_modes, ones, ones, init=init[0]).draws.item() < -0.9


def test_info_reports_loss_gradient_norm_and_cost() -> None:
    x, y = data()
    posterior = MAP(num_steps=50, polish=False).fit(linear, x, y)
    extra = posterior.info.extra
    expected = -posterior.target.log_density(posterior.draws[0, 0]).item() / len(x)
    assert extra["loss"] == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(extra["gradient_norm"])
    assert posterior.info.gradients == 51


def test_same_seed_same_draw_and_the_global_random_state_is_left_alone() -> None:
    x, y = data()
    state = torch.get_rng_state()
    first, again, other = (MAP(num_steps=20, batch_size=7).fit(linear, x, y, seed=s).draws for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1, got 0"),
        ({"step_size": -0.1}, "`step_size` must be > 0, got -0.1"),
        ({"optimiser": "lbfgs"}, "`optimiser` must be one of 'adam', 'sgd', 'adagrad', got 'lbfgs'"),
        ({"schedule": "linear"}, "`schedule` must be one of 'constant', 'cosine', got 'linear'"),
        ({"num_restarts": 1.5}, "`num_restarts` must be an integer >= 1, got 1.5"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAP(**fields)  # type: ignore[arg-type]
