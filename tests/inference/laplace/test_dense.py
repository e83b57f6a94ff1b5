"""Dense Laplace: exact on linear-Gaussian models, the right curvature elsewhere, and what it refuses."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.backend import ApproximationWarning
from inference.curvature import empirical_fisher, ggn
from inference.errors import CapabilityError, UnsupportedModelError
from inference.hessians import hessian, prior_precision
from inference.laplace import DenseLaplace
from inference.point import MAP
from inference.target import compile_target

N, D = 15, 4
NOISE, PRIOR = 0.5, 1.5
START = MAP(num_steps=30)
LONGER_START = MAP(num_steps=300)
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def network(x: Tensor, y: Tensor | None = None) -> None:
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([D, 3]).to_event(2))
    w2 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1) @ w2, scale), obs=y)


def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(0.0, tau).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def improper(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, 0] * w.sum(), NOISE), obs=y)


def _data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + NOISE * torch.randn(N, generator=generator)
    return x, y


def _wavy_data() -> tuple[Tensor, Tensor]:
    """More data than weights, so that the network's mode is a well-behaved one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, D, generator=generator)
    return x, torch.sin(x[:, 0] + x[:, 1]) + NOISE * torch.randn(60, generator=generator)


def _conjugate(
    x: Tensor, y: Tensor, temperature: float = 1.0, likelihood_temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance of Bayesian linear regression."""
    precision = x.mT @ x / (NOISE**2 * likelihood_temperature) + torch.eye(D) / PRIOR**2
    mean = torch.linalg.solve(precision, x.mT @ y) / (NOISE**2 * likelihood_temperature)
    return mean, temperature * torch.linalg.inv(precision)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_the_posterior_of_linear_regression_is_exact(seed: int, curvature: str) -> None:
    x, y = _data(seed)
    posterior = DenseLaplace(curvature=curvature, start=START).fit(linear, x, y, seed=seed)
    mean, covariance = _conjugate(x, y)
    torch.testing.assert_close(posterior.gaussian.loc, mean, **EXACT)
    torch.testing.assert_close(posterior.gaussian.covariance(), covariance, **EXACT)


def test_the_log_evidence_of_linear_regression_is_exact() -> None:
    x, y = _data()
    posterior = DenseLaplace(start=START).fit(linear, x, y)
    marginal = dist.MultivariateNormal(torch.zeros(N), NOISE**2 * torch.eye(N) + PRIOR**2 * x @ x.mT)
    assert posterior.log_evidence == pytest.approx(marginal.log_prob(y).item(), rel=1e-12)


def test_the_log_evidence_equals_its_second_expression() -> None:
    x, y = _data()
    posterior = DenseLaplace(start=START).fit(linear, x, y)
    mode, target = posterior.gaussian.loc, posterior.target
    h, a = ggn(target, mode), prior_precision(target, mode).diag()
    quadratic = torch.logdet(h + a) - torch.logdet(a) + mode @ a @ mode
    second = target.log_likelihood(mode).sum() - 0.5 * quadratic
    assert posterior.log_evidence == pytest.approx(second.item(), rel=1e-12)


def test_the_predictive_of_linear_regression_is_exact() -> None:
    x, y = _data()
    x_new, y_new = torch.randn(6, D), torch.randn(6)
    prediction = DenseLaplace(start=START).fit(linear, x, y).predict(x_new)
    mean, covariance = _conjugate(x, y)
    f_variance = (x_new @ covariance * x_new).sum(-1)
    torch.testing.assert_close(prediction.mean, x_new @ mean, **EXACT)
    torch.testing.assert_close(prediction.f_variance, f_variance, **EXACT)
    torch.testing.assert_close(prediction.variance, f_variance + NOISE**2, **EXACT)
    exact = dist.Normal(x_new @ mean, (f_variance + NOISE**2).sqrt())
    torch.testing.assert_close(prediction.log_prob(y_new), exact.log_prob(y_new), **EXACT)
    torch.testing.assert_close(prediction.quantile(0.05), exact.icdf(torch.tensor(0.05)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("temperature", "likelihood_temperature"), [(0.3, 1.0), (1.0, 2.0), (3.0, 0.5)])
def test_temperatures_scale_the_covariance_and_the_likelihood(
    temperature: float, likelihood_temperature: float
) -> None:
    x, y = _data()
    backend = DenseLaplace(start=START, temperature=temperature, likelihood_temperature=likelihood_temperature)
    posterior = backend.fit(linear, x, y)
    mean, covariance = _conjugate(x, y, temperature, likelihood_temperature)
    torch.testing.assert_close(posterior.gaussian.loc, mean, **EXACT)
    torch.testing.assert_close(posterior.gaussian.covariance(), covariance, **EXACT)
    with pytest.raises(CapabilityError):
        _ = posterior.log_evidence


def test_draws_have_the_exact_moments_within_monte_carlo_error() -> None:
    x, y = _data()
    mean, covariance = _conjugate(x, y)
    draws = DenseLaplace(start=START).fit(linear, x, y).sample(40_000, seed=3)
    standard = (draws.mean(0) - mean) / (covariance.diagonal() / 40_000).sqrt()
    assert standard.abs().max() < 4
    spread = (covariance.square() + covariance.diagonal()[:, None] * covariance.diagonal()) / 40_000
    assert ((draws.mT.cov() - covariance) / spread.sqrt()).abs().max() < 4.5


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher"])
def test_the_covariance_of_a_network_is_the_inverse_curvature_at_its_mode(curvature: str) -> None:
    x, y = _wavy_data()
    functions = {"ggn": ggn, "hessian": hessian, "fisher": empirical_fisher}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # the exact Hessian may need clipping; tested below
        posterior = DenseLaplace(curvature=curvature, start=LONGER_START).fit(network, x, y)
    target, mode = posterior.target, posterior.gaussian.loc
    likelihood = functions[curvature](target, mode)
    values, vectors = torch.linalg.eigh(likelihood)
    precision = vectors * values.clamp_min(0) @ vectors.mT + prior_precision(target, mode).diag()
    covariance = posterior.gaussian.covariance()
    torch.testing.assert_close(covariance @ precision, torch.eye(target.dim), rtol=1e-7, atol=1e-7)


def test_newton_steps_take_a_network_to_its_mode() -> None:
    x, y = _wavy_data()
    posterior = DenseLaplace(start=LONGER_START).fit(network, x, y)
    gradient = torch.func.grad(posterior.target.log_density)(posterior.gaussian.loc)
    assert gradient.norm() < 1e-4
    assert posterior.info.extra["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6, abs=1e-10)
    assert posterior.info.extra["newton_decrement"] < 1e-10


def test_the_mode_of_a_constrained_site_includes_its_jacobian() -> None:
    def gamma(x: Tensor, y: Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0 * rate, 1.0), obs=y)

    posterior = DenseLaplace(start=MAP(num_steps=200)).fit(gamma, torch.zeros(1, 1), torch.zeros(1))
    # In t = log(rate): log p = 3 t - exp(t), mode exp(t) = 3, curvature exp(t) = 3.
    torch.testing.assert_close(posterior.gaussian.loc.exp(), torch.tensor([3.0]), **EXACT)
    torch.testing.assert_close(posterior.gaussian.variance, torch.tensor([1 / 3]), **EXACT)


def test_a_learnt_noise_scale_is_part_of_theta_and_of_the_curvature() -> None:
    x, y = _wavy_data()
    posterior = DenseLaplace(start=LONGER_START).fit(network, x, y)
    scale = next(site for site in posterior.target.sites if site.name == "scale")
    # Fisher of the log scale is 2 per datum; the half-normal prior adds 2 exp(2 t) and nothing couples the two.
    expected = 1 / (2 * len(x) + 2 * (2 * posterior.gaussian.loc[scale.start]).exp())
    torch.testing.assert_close(posterior.gaussian.variance[scale.start], expected, **EXACT)


def test_float32_models_are_fitted_and_keep_their_dtype() -> None:
    x, y = _data()
    posterior = DenseLaplace(start=START).fit(linear, x.float(), y.float())
    mean, covariance = _conjugate(x, y)
    assert posterior.gaussian.loc.dtype == torch.float32
    torch.testing.assert_close(posterior.gaussian.loc.double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.gaussian.covariance().double(), covariance, rtol=1e-4, atol=1e-5)


def test_without_a_start_the_given_point_is_the_mode() -> None:
    x, y = _data()
    mean, covariance = _conjugate(x, y)
    posterior = DenseLaplace(start=None).fit(linear, x, y, init=mean)
    assert torch.equal(posterior.gaussian.loc, mean)
    torch.testing.assert_close(posterior.gaussian.covariance(), covariance, **EXACT)
    again = DenseLaplace(start=None).fit(linear, x, y, init=MAP(num_steps=300).fit(linear, x, y))
    torch.testing.assert_close(again.gaussian.loc, mean, rtol=1e-4, atol=1e-4)
    sites = DenseLaplace(start=None).fit(linear, x, y, init={"w": mean})
    assert torch.equal(sites.gaussian.loc, mean)


def test_a_point_away_from_the_mode_is_warned_of_with_the_newton_decrement() -> None:
    x, y = _data()
    mean, covariance = _conjugate(x, y)
    off = mean + torch.linalg.cholesky(covariance) @ torch.tensor([2.0, 0.0, 0.0, 0.0])
    with pytest.warns(ApproximationWarning, match=r"Newton decrement .* is 4 instead of 0"):
        posterior = DenseLaplace(start=None).fit(linear, x, y, init=off)
    assert posterior.info.warnings[0][0] == "ApproximationWarning"


def test_negative_eigenvalues_of_the_exact_hessian_are_clipped_and_counted() -> None:
    x, y = _data()
    target = compile_target(network, x, y)
    theta = target.initial(1, seed=0)[0]
    matrix = hessian(target, theta)
    values, vectors = torch.linalg.eigh(matrix)
    count = int((values < -1e-10 * matrix.diagonal().abs().max()).sum())
    assert count > 0
    with pytest.warns(ApproximationWarning) as caught:
        posterior = DenseLaplace(curvature="hessian", start=None).fit(network, x, y, init=theta)
    assert any(f"has {count} negative eigenvalues" in str(w.message) for w in caught)
    expected = vectors * values.clamp_min(0) @ vectors.mT + prior_precision(target, theta).diag()
    torch.testing.assert_close(torch.linalg.inv(posterior.gaussian.covariance()), expected, rtol=1e-7, atol=1e-7)


def test_an_indefinite_hierarchical_prior_is_added_exactly_where_the_data_outweigh_it() -> None:
    x, y = _data()
    posterior = DenseLaplace(start=LONGER_START).fit(hierarchical, x, y)
    expected = torch.func.hessian(lambda t: -posterior.target.log_density(t))(posterior.gaussian.loc)
    assert torch.linalg.eigvalsh(prior_precision(posterior.target, posterior.gaussian.loc))[0] < 0
    torch.testing.assert_close(torch.linalg.inv(posterior.gaussian.covariance()), expected, rtol=1e-7, atol=1e-7)


def test_an_indefinite_prior_is_clipped_with_a_warning_where_the_data_do_not() -> None:
    x, y = _data()
    theta = torch.tensor([-2.0, 1.0, -1.0, 1.0, 1.0])
    with pytest.warns(ApproximationWarning) as caught:
        posterior = DenseLaplace(start=None).fit(hierarchical, 0.01 * x, y, init=theta)
    assert any("the prior's curvature has 1 negative eigenvalues" in str(w.message) for w in caught)
    assert bool((posterior.gaussian.variance > 0).all())


def test_a_flat_direction_is_an_error_that_names_the_site() -> None:
    x, y = _data()
    with pytest.raises(ValueError, match="must be positive definite, got a smallest eigenvalue of .* along site 'w'"):
        DenseLaplace(start=None).fit(improper, x, y, init=torch.tensor([0.4, 0.5]))


def test_a_matrix_that_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.laplace.memory.available_bytes", lambda device: 200)
    with pytest.raises(
        ValueError,
        match=r"P = 4 parameters needs about 0\.0 GB, but 0\.0 GB .* use .*DiagonalLaplace\(\) \(.* GB\), Subset",
    ):
        DenseLaplace().fit(linear, *_data())


def test_available_memory_is_a_plausible_number_here() -> None:
    from inference.laplace.memory import available_bytes, require_memory

    available = available_bytes(torch.device("cpu"))
    assert available is not None
    assert 2**26 < available < 2**45
    with pytest.raises(ValueError, match="a matrix needs about 1,000,000,000.0 GB"):
        require_memory(10**18, "a matrix", "use a smaller one", torch.device("cpu"))


def test_the_exact_hessian_is_refused_for_large_networks() -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([5001]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w.sum() * x[:, 0], 1.0), obs=y)

    with pytest.raises(ValueError, match='curvature="hessian" .* P <= 5,000, got P = 5,001'):
        DenseLaplace(curvature="hessian").fit(wide, *_data())


def test_a_likelihood_without_a_closed_form_is_refused_before_the_work() -> None:
    def cauchy(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Cauchy(x @ w, 1.0), obs=y)

    x, y = _data()
    with pytest.raises(UnsupportedModelError, match="Cauchy"):
        DenseLaplace().fit(cauchy, x, y)
    posterior = DenseLaplace(curvature="hessian", predictive="sampled", start=LONGER_START).fit(cauchy, x, y)
    expected = torch.func.hessian(lambda t: -posterior.target.log_density(t))(posterior.gaussian.loc)
    torch.testing.assert_close(torch.linalg.inv(posterior.gaussian.covariance()), expected, rtol=1e-7, atol=1e-7)


def test_the_sampled_predictive_uses_draws_and_warns_where_they_no_longer_fit() -> None:
    x, y = _data()
    fine = DenseLaplace(predictive="sampled", start=START).fit(linear, x, y)
    prediction = fine.predict(x, num_samples=20_000)
    mean, covariance = _conjugate(x, y)
    f_variance = (x @ covariance * x).sum(-1)
    assert ((prediction.mean - x @ mean) / (f_variance / 20_000).sqrt()).abs().max() < 4
    torch.testing.assert_close(prediction.f_variance, f_variance, rtol=0.06, atol=0)

    def wiggly(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.exp(w[0]) * torch.sin(w[1] * x[:, 0]), 0.01), obs=y)

    wave = torch.linspace(0.01, 0.05, N)[:, None]
    with pytest.warns(ApproximationWarning, match="fit the training data worse than the mode by"):
        DenseLaplace(predictive="sampled", start=None).fit(
            wiggly, wave, 3 * torch.sin(wave[:, 0]), init=torch.tensor([math.log(3.0), 1.0])
        )


def test_same_seed_same_posterior_and_the_global_random_state_is_untouched() -> None:
    x, y = _data()
    state = torch.get_rng_state()
    first, again = (DenseLaplace(start=START).fit(linear, x, y, seed=1) for _ in range(2))
    assert torch.equal(first.gaussian.loc, again.gaussian.loc)
    assert torch.equal(first.sample(3, seed=2), again.sample(3, seed=2))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"curvature": "kfac"}, '`curvature` must be one of "ggn", "hessian", "fisher", "monte_carlo", got \'kfac\''),
        ({"predictive": "probit"}, '`predictive` must be "linearized" or "sampled", got \'probit\''),
        ({"polish_steps": -1}, "`polish_steps` must be an integer >= 0, got -1"),
        ({"newton_steps": 1.5}, "`newton_steps` must be an integer >= 0, got 1.5"),
        ({"start": "adam"}, "`start` must be a MAP backend or None, got 'adam'"),
        ({"temperature": 0.0}, "`temperature` must be > 0"),
    ],
)
def test_bad_hyperparameters_say_what_was_expected(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseLaplace(**fields)


def test_the_repr_recreates_the_backend() -> None:
    backend = DenseLaplace(curvature="fisher", start=None, newton_steps=3)
    assert eval(repr(backend), {"DenseLaplace": DenseLaplace, "MAP": MAP}) == backend
    assert eval(repr(DenseLaplace()), {"DenseLaplace": DenseLaplace, "MAP": MAP}) == DenseLaplace()


def test_no_optimiser_and_no_starting_point_is_refused() -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    x = torch.ones(3)
    with pytest.raises(ValueError, match="`start=None` takes the mode from `init`"):
        DenseLaplace(start=None).fit(model, x, x)
