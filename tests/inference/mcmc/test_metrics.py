from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import HMC, MAP, NUTS, DeepEnsemble, DenseLaplace, DiagonalLaplace, GaussianPosterior
from inference.distributions import DenseGaussian, DiagonalGaussian, LowRankGaussian
from inference.mcmc.integrators import velocity
from inference.mcmc.low_rank import LowRankEstimator
from inference.mcmc.mass import metric_of, prior_variances
from inference.mcmc.metrics import Metric
from inference.posterior import DrawsPosterior
from inference.spectral_gaussian import SpectralGaussian
from inference.target import compile_target
from tests.inference.mcmc.sampling import HMC as HMC_KERNEL
from tests.inference.mcmc.sampling import CorrelatedGaussian, draws_of, ensemble, z_scores


def dense_covariance(metric: Metric) -> Tensor:
    """The inverse mass, column by column."""
    return torch.stack([metric.velocity(e) for e in torch.eye(metric.root.shape[-1])], 1)


def gaussians(dim: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, 2, generator=generator))[0]
    diagonal, factor = 0.5 + torch.rand(dim, generator=generator), torch.randn(dim, 2, generator=generator)
    loc = torch.zeros(dim)
    return {
        "diagonal": DiagonalGaussian(loc, diagonal),
        "low rank": LowRankGaussian(loc, diagonal, factor),
        "spectral": SpectralGaussian(loc, diagonal, basis, torch.tensor([0.1, 9.0])),
        "dense": DenseGaussian.from_covariance(loc, torch.diag(diagonal) + factor @ factor.T),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [("diagonal", "diagonal"), ("low rank", "low_rank"), ("spectral", "low_rank"), ("dense", "dense")],
)
def test_a_gaussian_becomes_a_mass_matrix_of_its_own_structure(name: str, kind: str) -> None:
    gaussian = gaussians()[name]
    metric = metric_of(gaussian, torch.zeros(7))
    assert metric.kind == kind
    assert metric.estimator(torch.zeros(7)) is None
    covariance = gaussian.covariance()
    torch.testing.assert_close(dense_covariance(metric), covariance, rtol=1e-9, atol=1e-9)
    linear = torch.stack([metric.momentum(e) for e in torch.eye(7)], 1)
    torch.testing.assert_close(linear @ linear.T, torch.linalg.inv(covariance), rtol=1e-8, atol=1e-8)


def test_low_rank_velocities_are_batched_and_differ_from_dense_ones_only_in_storage() -> None:
    metric = metric_of(gaussians()["spectral"], torch.zeros(7))
    momentum = torch.randn(3, 7)
    packed = torch.stack([metric.inverse_mass] * 3)
    dense = torch.stack([dense_covariance(metric)] * 3)
    torch.testing.assert_close(velocity(packed, momentum), velocity(dense, momentum), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 21, 22, 23, 40])
def test_a_low_rank_mass_is_never_taken_for_a_dense_one(dim: int) -> None:
    metric = Metric.identity("low_rank", torch.zeros(dim))
    assert metric.inverse_mass.shape[0] != dim or dim == 1
    momentum = torch.randn(2, dim)
    packed = torch.stack([metric.inverse_mass] * 2)
    torch.testing.assert_close(velocity(packed, momentum), momentum, rtol=0, atol=0)
    torch.testing.assert_close(metric.momentum(momentum[0]), momentum[0], rtol=0, atol=0)


class Stretched:
    """A Gaussian of 30 dimensions with one direction ten times as long, one ten times as short, and uneven scales."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(30, 2, generator=generator))[0]
        scale = torch.logspace(-1, 1, 30)
        self.gaussian = SpectralGaussian(torch.zeros(30), scale, basis, torch.tensor([100.0, 0.01]))
        self.covariance = self.gaussian.covariance()
        self.precision = torch.linalg.inv(self.covariance)

    def log_density(self, theta: Tensor) -> Tensor:
        return -0.5 * theta @ (self.precision @ theta)

    def condition(self, inverse_mass: Tensor) -> float:
        """Ratio of the slowest to the fastest period that a leapfrog sees."""
        root = torch.linalg.cholesky(inverse_mass)
        values = torch.linalg.eigvalsh(root.T @ self.precision @ root)
        return float((values[-1] / values[0]).sqrt())


def test_a_low_rank_estimate_finds_the_directions_of_a_gaussian_in_few_draws() -> None:
    stretched = Stretched()
    estimator = LowRankEstimator(5, torch.zeros(30))
    for theta in stretched.gaussian.sample(40, torch.Generator().manual_seed(0)):
        estimator.add(theta, -stretched.precision @ theta)
    metric = Metric.identity("low_rank", torch.zeros(30), 5).updated(estimator.regularised(torch.float64))
    covariance = dense_covariance(metric)
    # Condition 2.2 measured; 100 without a correction, 10 or more for the sample's own variances.
    assert stretched.condition(covariance) < 4
    assert stretched.condition(stretched.covariance.diagonal().diag()) > 8
    torch.testing.assert_close(covariance, covariance.T, rtol=1e-9, atol=1e-9)


def test_more_draws_than_dimensions_give_the_covariance_itself() -> None:
    stretched = Stretched()
    estimator = LowRankEstimator(14, torch.zeros(30))
    for theta in stretched.gaussian.sample(200, torch.Generator().manual_seed(0)):
        estimator.add(theta, -stretched.precision @ theta)
    metric = Metric.identity("low_rank", torch.zeros(30), 14).updated(estimator.regularised(torch.float64))
    assert stretched.condition(dense_covariance(metric)) < 2.1  # eigenvalues between 1/2 and 2 are left alone


def test_the_window_of_a_low_rank_estimate_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.mcmc.low_rank.CAPACITY", 3)
    estimator = LowRankEstimator(1, torch.zeros(4))
    for n in range(5):
        estimator.add(torch.full((4,), float(n)), torch.zeros(4))
    assert estimator.tensors()["rows"][:, 0, 0].tolist() == [2.0, 3.0, 4.0]


def test_an_unusable_low_rank_estimate_leaves_the_masses() -> None:
    metric = Metric.identity("low_rank", torch.zeros(6))
    estimator = LowRankEstimator(2, torch.zeros(6))
    for _ in range(4):
        estimator.add(torch.ones(6), torch.ones(6))  # no variance at all
    assert metric.updated(estimator.regularised(torch.float64)) is metric
    assert metric.updated(torch.full((5, 6), torch.nan)) is metric


@pytest.mark.slow
@pytest.mark.parametrize("mass_matrix", ["low_rank", "dense"])
def test_chains_with_an_adapted_mass_draw_from_a_stretched_gaussian(mass_matrix: str) -> None:
    stretched = Stretched()
    starts = stretched.gaussian.sample(4, torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"num_samples": 200, "warmup_steps": 300, "mass_matrix": mass_matrix}
    draws = draws_of(stretched.log_density, starts, **options)
    assert np.abs(z_scores(draws, torch.zeros(30))).max() < 4
    assert np.abs(z_scores(draws.square(), stretched.covariance.diagonal())).max() < 4


@pytest.mark.slow
def test_a_low_rank_mass_needs_fewer_leapfrogs_than_a_diagonal_one() -> None:
    stretched = Stretched()
    starts = stretched.gaussian.sample(2, torch.Generator().manual_seed(5))
    gradients = {}
    for mass_matrix in ("diagonal", "low_rank"):
        running = ensemble(
            stretched.log_density,
            starts,
            num_samples=50,
            warmup_steps=300,
            mass_matrix=mass_matrix,  # type: ignore[arg-type]
        )
        running.run()
        gradients[mass_matrix] = sum(sum(r.stats["n_steps"]) for r in running.records)
    assert gradients["low_rank"] < 0.4 * gradients["diagonal"]


def test_hmc_with_a_low_rank_mass_keeps_the_moments() -> None:
    gaussian = CorrelatedGaussian(10)
    draws = draws_of(gaussian.log_density, gaussian.sample(8), HMC_KERNEL, mass_matrix="low_rank", num_samples=200)
    assert np.abs(z_scores(draws, gaussian.loc)).max() < 4
    assert np.abs(z_scores((draws - gaussian.loc).square(), gaussian.covariance.diagonal())).max() < 4


def scales(x: Tensor, y: Tensor | None = None) -> None:
    wide = pyro.sample("wide", dist.Normal(torch.zeros(50), 3.0).to_event(1))
    uneven = pyro.sample("uneven", dist.Normal(torch.zeros(3), torch.tensor([0.1, 1.0, 10.0])).to_event(1))
    positive = pyro.sample("positive", dist.LogNormal(0.0, 0.5))
    heavy = pyro.sample("heavy", dist.Cauchy(torch.zeros(40), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x * (wide.sum() + uneven.sum() + heavy.sum()), positive), obs=y)


def test_prior_variances_are_those_of_the_prior_in_unconstrained_space() -> None:
    target = compile_target(scales, torch.zeros(4), torch.zeros(4))
    found = prior_variances(target)
    assert len(set(found[:50].tolist())) == 1  # one site, one scale
    assert float(found[0]) == pytest.approx(9.0, rel=4 * (2 / (199 * 50)) ** 0.5)
    error = 4 * (2 / 199) ** 0.5
    torch.testing.assert_close(found[50:53], torch.tensor([0.01, 1.0, 100.0]), rtol=error, atol=0)
    assert float(found[53]) == pytest.approx(0.25, rel=error)
    assert float(found[54:].max()) < 10 * 2.2 * 3  # a Cauchy has no variance; ten times its quartiles' at most


def test_prior_masses_stay_as_they_are() -> None:
    target = compile_target(scales, torch.zeros(4), torch.zeros(4))
    backend = NUTS(num_samples=4, warmup_steps=60, num_chains=2, mass_matrix="prior", max_tree_depth=3, progress=False)
    with pytest.warns(UserWarning, match="reached max_tree_depth"):
        posterior = backend.fit_to(target, seed=0)
    assert bool(torch.isfinite(posterior.draws).all())


def linear(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    return x, x.sum(1) + 0.5 * torch.randn(20, generator=generator)


@pytest.mark.parametrize("laplace", [DenseLaplace, DiagonalLaplace])
def test_a_laplace_curvature_is_the_mass_matrix(laplace: type) -> None:
    x, y = data()
    curvature = laplace().fit(linear, x, y)
    assert isinstance(curvature, GaussianPosterior)
    backend = HMC(num_samples=150, warmup_steps=100, num_chains=8, mass_matrix=curvature, progress=False)
    draws = backend.fit(linear, x, y, seed=0, init=curvature).draws
    covariance = torch.linalg.inv(torch.eye(4) + x.T @ x / 0.25)
    mean = covariance @ x.T @ y / 0.25
    assert np.abs(z_scores(draws, mean)).max() < 4
    assert np.abs(z_scores((draws - mean).square(), covariance.diagonal())).max() < 4


def test_a_curvature_of_another_model_is_refused() -> None:
    x, y = data()
    curvature = DiagonalLaplace().fit(linear, x, y)
    backend = NUTS(mass_matrix=curvature)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belongs to another model"):
        backend.fit(scales, torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mass_matrix": "full"}, r"`mass_matrix` must be one of .* or a Gaussian posterior, got 'full'"),
        ({"mass_matrix": torch.eye(2)}, "`mass_matrix` must be one of"),
        ({"mass_rank": 0}, "`mass_rank` must be an integer >= 1"),
        ({"init_jitter": -1.0}, "`init_jitter` must be >= 0"),
    ],
)
def test_bad_masses_are_named(fields: dict[str, Any], message: str) -> None:
    for backend in (NUTS, HMC):
        with pytest.raises(ValueError, match=message):
            backend(**fields)


def starts_of(init: Any, num_chains: int = 4, **changes: Any) -> Tensor:
    """Where chains begin: one leapfrog of no length."""
    fields: dict[str, Any] = {"step_size": 1e-9, "adapt_step_size": False, "num_leapfrogs": 1, "progress": False}
    backend = HMC(num_samples=4, warmup_steps=0, num_chains=num_chains, **{**fields, **changes})
    return backend.fit(linear, *data(), seed=0, init=init).draws[:, 0]


def test_chains_start_at_a_mode_jittered_if_asked() -> None:
    mode = MAP().fit(linear, *data())
    torch.testing.assert_close(starts_of(mode), mode.mean_theta.expand(4, 4), rtol=0, atol=1e-6)
    jittered = starts_of(mode, init_jitter=0.1) - mode.mean_theta
    assert len(torch.unique(jittered)) == 16
    assert 0.03 < float(jittered.square().mean().sqrt()) < 0.3
    fewer = starts_of(mode, num_chains=2, init_jitter=0.1) - mode.mean_theta
    torch.testing.assert_close(fewer, jittered[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_chains", "times"), [(3, [1, 1, 1]), (7, [2, 2, 3])])
def test_every_member_of_an_ensemble_starts_a_chain(num_chains: int, times: list[int]) -> None:
    members = DeepEnsemble(num_members=3, num_steps=5).fit(linear, *data())
    assert isinstance(members, DrawsPosterior)
    distances = torch.cdist(starts_of(members, num_chains), members.flat_draws)
    assert float(distances.min(1).values.max()) < 1e-6
    counts = torch.bincount(distances.argmin(1), minlength=3)
    assert sorted(counts.tolist()) == times


def test_chains_start_at_draws_of_a_gaussian() -> None:
    gaussian = DenseLaplace().fit(linear, *data())
    starts = starts_of(gaussian)
    assert len(torch.unique(starts)) == 16
    torch.testing.assert_close(starts, gaussian.sample(4, 0), rtol=0, atol=1e-6)


def test_an_init_of_another_model_is_refused_before_sampling() -> None:
    other = MAP(num_steps=5, polish=False).fit(scales, torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="`init` belongs to another model: its site 'wide'"):
        starts_of(other)
