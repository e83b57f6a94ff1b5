import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import (
    NUTS,
    ApproximationWarning,
    DrawsPosterior,
    GaussianPosterior,
    NonFiniteError,
    Pathfinder,
    compile_target,
)
from inference.spectral_gaussian import SpectralGaussian
from inference.variational.pathfinder import estimates, inverse_hessian

QUIET: dict[str, Any] = {"compile": False, "progress": False}


def quadratic(dim: int = 8) -> tuple[Tensor, Tensor]:
    """Precision and mode of a Gaussian of condition about 100."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return basis @ torch.diag(torch.logspace(-1, 1, dim)) @ basis.T, torch.linspace(-2, 2, dim)


def slow_inverse_hessian(diagonal: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The BFGS update of a dense matrix, pair by pair."""
    inverse = torch.diag(diagonal)
    identity = torch.eye(diagonal.shape[0])
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = identity - rho * torch.outer(s, y)
        inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
    return inverse


@pytest.mark.parametrize("num_pairs", [0, 1, 3, 6])
def test_the_compact_inverse_hessian_is_the_bfgs_update(num_pairs: int) -> None:
    precision, _ = quadratic()
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(num_pairs, 8, generator=generator)
    pairs = [(s, precision @ s) for s in steps]
    diagonal = 0.5 + torch.rand(8, generator=generator)
    point, gradient = torch.randn(2, 8, generator=generator)
    found = inverse_hessian(point, gradient, diagonal, pairs)
    assert found is not None
    expected = slow_inverse_hessian(diagonal, pairs)
    torch.testing.assert_close(found.covariance(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loc, point + expected @ gradient, rtol=1e-9, atol=1e-9)
    if_last = expected @ pairs[-1][1] - pairs[-1][0] if pairs else torch.zeros(8)
    torch.testing.assert_close(if_last, torch.zeros(8), rtol=0, atol=1e-9)  # the secant equation


def test_as_many_conjugate_steps_as_dimensions_give_the_covariance() -> None:
    precision, mode = quadratic()
    values, vectors = torch.linalg.eigh(precision)
    point = mode + torch.ones(8)
    points, gradients = [point], [-precision @ (point - mode)]
    for direction in vectors.T:  # eigenvectors are conjugate
        point = point - direction * (direction @ (point - mode)) * 0.9
        points.append(point)
        gradients.append(-precision @ (point - mode))
    last = estimates(points, gradients, history_size=8)[-1]
    torch.testing.assert_close(last.covariance(), torch.linalg.inv(precision), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(last.loc, mode, rtol=1e-8, atol=1e-8)
    assert float(values[0]) > 0


def test_a_step_of_no_positive_curvature_is_left_out() -> None:
    points = [torch.zeros(2), torch.ones(2)]
    gradients = [torch.zeros(2), torch.ones(2)]  # the gradient grows uphill: not concave
    found = estimates(points, gradients, history_size=3)
    assert [g.eigenvalues.numel() for g in found] == [0, 0]


def linear(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator)
    return x, x.sum(1) + 0.5 * torch.randn(40, generator=generator)


def exact() -> torch.distributions.MultivariateNormal:
    x, y = data()
    precision = torch.eye(12) + x.T @ x / 0.25
    return torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, x.T @ y / 0.25), precision_matrix=precision
    )


def test_one_path_gives_a_gaussian_close_to_a_gaussian_posterior() -> None:
    posterior = Pathfinder(history_size=12, **QUIET).fit(linear, *data(), seed=0)
    assert isinstance(posterior, GaussianPosterior)
    assert isinstance(posterior.gaussian, SpectralGaussian)
    found = torch.distributions.MultivariateNormal(posterior.mean_theta, posterior.gaussian.covariance())
    assert float(torch.distributions.kl_divergence(found, exact())) < 1.0  # of 12 directions
    assert posterior.diagnose().khat < 0.7


def test_several_paths_are_weighted_towards_the_posterior() -> None:
    posterior = Pathfinder(num_paths=4, num_draws=4000, **QUIET).fit(linear, *data(), seed=0)
    assert isinstance(posterior, DrawsPosterior)
    assert posterior.draws.shape == (1, 4000, 12)
    weights = posterior.weights.reshape(-1)
    size = float(1 / weights.square().sum())
    assert size > 200
    truth = exact()
    z = (posterior.mean_theta - truth.mean) / (truth.variance / size).sqrt()
    assert float(z.abs().max()) < 4.5
    x, y = data()
    evidence = torch.distributions.MultivariateNormal(torch.zeros(40), 0.25 * torch.eye(40) + x @ x.T).log_prob(y)
    assert posterior.log_evidence == pytest.approx(float(evidence), abs=4.5 / size**0.5)
    assert posterior.info.extra["khat"] < 0.7


def two_modes(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(0.0, 2.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(weight.square() * x, 0.5), obs=y)


def test_several_paths_see_several_modes() -> None:
    x = torch.ones(10)
    starts = torch.tensor([[2.0], [-2.0], [1.5], [-1.5]])
    posterior = Pathfinder(num_paths=4, **QUIET).fit(two_modes, x, 4 * x, seed=0, init=starts)
    share = float(posterior.weights[posterior.draws[..., 0] > 0].sum())
    assert share == pytest.approx(0.5, abs=4.5 * 0.5 / 1000**0.5)
    one = Pathfinder(**QUIET).fit(two_modes, x, 4 * x, seed=0, init=torch.tensor([2.0]))
    assert float((one.sample(500) > 0).double().mean()) == 1.0


def test_a_poor_fit_warns_with_its_khat() -> None:
    def funnel(x: Tensor, y: Tensor | None = None) -> None:
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(20), (0.5 * log_scale).exp()).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(0.0 * z.sum() * x, 1.0), obs=y)

    with pytest.warns(ApproximationWarning, match=r"k-hat of the importance weights is \d"):
        Pathfinder(num_paths=2, **QUIET).fit(funnel, torch.ones(2), torch.zeros(2), seed=0)


def test_chains_start_at_draws_of_a_path() -> None:
    start = Pathfinder(**QUIET).fit(linear, *data(), seed=0)
    several = Pathfinder(num_paths=3, **QUIET).fit(linear, *data(), seed=0)
    for init in (start, several):
        chains = NUTS(num_samples=40, warmup_steps=100, num_chains=2, **QUIET).fit(linear, *data(), seed=1, init=init)
        distance = (chains.draws.mean((0, 1)) - exact().mean) / exact().variance.sqrt()
        assert float(distance.abs().max()) < 2


def test_a_path_in_float32_is_followed_in_float64() -> None:
    torch.set_default_dtype(torch.float32)
    x, y = (value.float() for value in data())
    single = Pathfinder(**QUIET).fit(linear, x, y, seed=0)
    assert single.mean_theta.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    double = Pathfinder(**QUIET).fit(linear, x.double(), y.double(), seed=0, init=torch.zeros(12))
    distance = (single.mean_theta.double() - double.mean_theta) / exact().variance.sqrt()
    assert float(distance.abs().max()) < 0.5


def test_the_cost_is_counted() -> None:
    posterior = Pathfinder(num_elbo_draws=3, **QUIET).fit(linear, *data(), seed=0)
    steps = posterior.info.extra["steps"][0]
    assert posterior.info.gradients >= steps + 1 + (steps + 1) * 3 / 3
    assert posterior.info.gradients < 3 * (steps + 1) + (steps + 1) * 3 / 3


def test_a_start_that_is_not_finite_is_an_error() -> None:
    def broken(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(weight.log() * x, 1.0, validate_args=False), obs=y)

    target = compile_target(broken, torch.ones(2), torch.zeros(2))
    with pytest.raises(NonFiniteError, match="not finite at the starting point; pass `init`"):
        Pathfinder(**QUIET).fit_to(target, init=torch.tensor([-1.0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("history_size", 0),
        ("num_elbo_draws", 0),
        ("num_paths", 0),
        ("num_draws", 24),
        ("tolerance", -1.0),
        ("tolerance", math.nan),
    ],
)
def test_bad_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        Pathfinder(**{field: value})


def test_weights_of_several_paths_sum_to_one() -> None:
    posterior = Pathfinder(num_paths=3, num_draws=200, **QUIET).fit(linear, *data(), seed=0)
    assert isinstance(posterior, DrawsPosterior)
    assert float(posterior.weights.sum()) == pytest.approx(1.0)
    assert bool(torch.isfinite(posterior.predict(data()[0]).mean).all())
