"""Conversion to ArviZ: groups, dimensions and values, and the functions of ArviZ that people call on the result."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from inference.distributions import DenseGaussian, DiagonalGaussian
from inference.posterior import DrawsPosterior, GaussianPosterior, MixturePosterior, Posterior
from inference.target import Target, compile_target
from tests.cases import CASES, Case

mpl.use("Agg")


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def target_of(name: str) -> Target:
    case = case_named(name)
    return compile_target(case.model(), case.x, case.y)


def chains(name: str = "by_hand") -> DrawsPosterior:
    target = target_of(name)
    values = 0.3 * torch.randn(4, 50, target.dim, generator=torch.Generator().manual_seed(0))
    stats = {"diverging": torch.zeros(4, 50, dtype=torch.bool), "energy": torch.rand(4, 50)}
    return DrawsPosterior(target, values, backend="Chains()", sample_stats=stats)


def gaussian(name: str = "by_hand", shift: float = 0.0) -> GaussianPosterior:
    target = target_of(name)
    return GaussianPosterior(
        target, DiagonalGaussian(torch.full((target.dim,), shift), torch.full((target.dim,), 0.2)), backend="G()"
    )


def mixture(name: str = "by_hand") -> MixturePosterior:
    return MixturePosterior(target_of(name), [gaussian(name), gaussian(name, 0.3)], backend="M()")


def single(name: str = "by_hand") -> DrawsPosterior:
    target = target_of(name)
    return DrawsPosterior(target, 0.1 * torch.ones(1, 1, target.dim), backend="MAP()")


def restricted() -> GaussianPosterior:
    whole = target_of("by_hand")
    small = whole.restrict("w2", torch.linspace(-1, 1, whole.dim))
    return GaussianPosterior(small, DiagonalGaussian(torch.zeros(2), torch.ones(2)), backend="R()")


MAKERS = [chains, gaussian, mixture, single, restricted]


@pytest.fixture
def _arviz_may_warn() -> Iterator[None]:
    """ArviZ warns of unreliable importance weights and constant draws (its job), and calls deprecated functions."""
    with warnings.catch_warnings():
        for text in (
            "Estimated shape parameter",
            ".*posterior variance of the log predictive densities",
            ".*Your data appears",
        ):
            warnings.filterwarnings("ignore", text, UserWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="arviz")
        warnings.filterwarnings("ignore", category=mpl.MatplotlibDeprecationWarning)
        warnings.filterwarnings("ignore", ".*inplace keyword in DataFrame.sort_values")
        yield


@pytest.mark.parametrize("maker", MAKERS)
def test_every_group_is_there_with_real_dimensions(maker: Any) -> None:
    posterior: Posterior = maker()
    data = posterior.to_arviz(num_samples=30)
    expected = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "observed_data"}
    assert expected <= set(data.groups())
    assert data.posterior_predictive.y.dims == ("chain", "draw", "obs_id")
    assert data.posterior_predictive.f.dims == ("chain", "draw", "obs_id")
    assert data.log_likelihood.y.dims == ("chain", "draw", "obs_id")
    assert data.observed_data.y.dims == ("obs_id",)
    assert data.posterior.w2.dims == ("chain", "draw", "w2_dim_0", "w2_dim_1")
    assert data.attrs["backend"] == repr(posterior.backend)
    np.testing.assert_array_equal(data.observed_data.y, posterior.target.y)
    assert np.isfinite(data.sample_stats.lp).all()
    lengths = {data[g].sizes["draw"] for g in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")}
    assert len(lengths) == 1


@pytest.mark.parametrize("name", [c.name for c in CASES if c.name not in {"subsampling", "subsampling_by_index"}])
def test_likelihoods_and_densities_equal_the_targets(name: str) -> None:
    posterior = chains(name)
    target = posterior.target
    data = posterior.to_arviz()
    theta = posterior.draws[2, 7]
    torch.testing.assert_close(torch.as_tensor(data.log_likelihood.y.values[2, 7]), target.log_likelihood(theta))
    assert float(data.sample_stats.lp[2, 7]) == pytest.approx(float(target.log_density(theta)), rel=1e-9)
    for site, value in target.unravel(theta).items():
        np.testing.assert_allclose(data.posterior[site].values[2, 7], value, rtol=1e-12)
    assert data.posterior_predictive.y.shape == (4, 50, *target.y.shape)


def test_lp_is_tempered_as_the_target_is() -> None:
    whole = chains()
    target = whole.target.tempered(2.0, 3.0)
    data = DrawsPosterior(target, whole.draws, backend="C()").to_arviz()
    assert float(data.sample_stats.lp[1, 3]) == pytest.approx(float(target.log_density(whole.draws[1, 3])), rel=1e-9)


def test_the_samplers_own_statistics_are_kept() -> None:
    posterior = chains()
    posterior.sample_stats["lp"] = torch.arange(200.0).reshape(4, 50)
    data = posterior.to_arviz()
    np.testing.assert_array_equal(data.sample_stats.lp, posterior.sample_stats["lp"])
    assert data.sample_stats.diverging.dtype == bool


@pytest.mark.usefixtures("_arviz_may_warn")
@pytest.mark.parametrize("name", ["two_outputs", "two_plates", "categorical"])
def test_targets_and_functions_keep_their_own_dimensions(name: str) -> None:
    data = chains(name).to_arviz()
    case = case_named(name)
    assert data.posterior_predictive.y.shape == (4, 50, *case.y.shape)
    assert data.posterior_predictive.f.dims == ("chain", "draw", "obs_id", "f_dim_0")
    assert data.log_likelihood.y.shape == (4, 50, 12)
    assert az.loo(data).n_data_points == 12


def test_predictive_draws_come_from_their_own_theta() -> None:
    target = target_of("by_hand")
    values = torch.zeros(1, 200, target.dim)
    values[0, :, target.sites[-1].start] = -9.0  # nearly no noise
    values[0, :, target.sites[3].start] = torch.linspace(-3, 3, 200)
    data = DrawsPosterior(target, values, backend="C()").to_arviz()
    np.testing.assert_allclose(data.posterior_predictive.y.values, data.posterior_predictive.f.values, atol=1e-3)
    assert np.unique(data.posterior_predictive.f.values[0, :, 0]).size == 200


def test_weighted_draws_are_resampled() -> None:
    target = target_of("by_hand")
    values = torch.randn(2, 3, target.dim)
    weights = torch.tensor([[0.0, 0, 1], [0, 0, 3]])
    data = DrawsPosterior(target, values, backend="W()", weights=weights).to_arviz(num_samples=400)
    first = data.posterior.b2.values.flatten()
    assert set(first) == {float(target.unravel(values[c, 2])["b2"]) for c in (0, 1)}
    assert abs((first == float(target.unravel(values[1, 2])["b2"])).mean() - 0.75) < 4.5 * (0.75 * 0.25 / 400) ** 0.5


def test_weights_can_be_left_out() -> None:
    data = chains().to_arviz(weights=False)
    assert set(data.posterior.data_vars) == {"f"}
    assert "prior" not in data.groups()
    assert az.summary(data, var_names=["f"]).shape[0] == 12


def test_fixed_sites_of_a_restricted_target_are_constants() -> None:
    posterior = restricted()
    data = posterior.to_arviz(num_samples=20)
    assert set(data.posterior.data_vars) == set(data.prior.data_vars) == {"w2"}
    fixed = posterior.target.unravel(torch.zeros(2))["w1"]
    np.testing.assert_array_equal(data.constant_data.w1, fixed)
    assert len(np.unique(data.posterior.w2)) == 40


def test_a_linearised_posterior_exports_the_network_it_predicts_with() -> None:
    target = target_of("by_hand")
    generator = torch.Generator().manual_seed(0)
    loc, factor = 0.5 * torch.randn(target.dim, generator=generator), 0.2 * torch.randn(target.dim, target.dim)
    inner = DenseGaussian.from_covariance(loc, factor @ factor.T + 0.01 * torch.eye(target.dim))
    posterior = GaussianPosterior(target, inner, backend="L()", linearized=True)
    data = posterior.to_arviz(num_samples=50)
    thetas: Tensor = posterior.sample(50, 0)
    eta = target.eta(loc) + torch.einsum("nep,sp->sne", jacrev(target.eta)(loc), thetas - loc)
    np.testing.assert_allclose(data.posterior_predictive.f[0], eta[..., 0], rtol=1e-9)
    expected = torch.distributions.Normal(eta[..., 0], eta[..., 1].exp()).log_prob(target.y)
    np.testing.assert_allclose(data.log_likelihood.y[0], expected, rtol=1e-8)
    joint = vmap(target.log_density)(thetas)
    np.testing.assert_allclose(data.sample_stats.lp[0], joint, rtol=1e-9)


@pytest.mark.usefixtures("_arviz_may_warn")
@pytest.mark.parametrize("maker", MAKERS)
def test_loo_summary_and_trace_plots_work(maker: Any) -> None:
    data = maker().to_arviz(num_samples=100)
    assert np.isfinite(az.loo(data).elpd_loo)
    assert np.isfinite(az.waic(data).elpd_waic)
    table = az.summary(data)
    assert np.isfinite(table["mean"]).all()
    az.plot_trace(data, var_names=["w2"])
    plt.close("all")


@pytest.mark.usefixtures("_arviz_may_warn")
def test_posteriors_can_be_compared() -> None:
    found = az.compare({"near": gaussian().to_arviz(), "far": gaussian(shift=2.0).to_arviz()})
    assert list(found.index) == ["near", "far"]


@pytest.mark.parametrize("maker", MAKERS)
def test_netcdf_keeps_everything(maker: Any, tmp_path: Path) -> None:
    data = maker().to_arviz(num_samples=20)
    data.to_netcdf(str(tmp_path / "run.nc"), engine="h5netcdf")
    back = az.from_netcdf(str(tmp_path / "run.nc"), engine="h5netcdf")
    assert set(back.groups()) == set(data.groups())
    for group in data.groups():
        for name, value in data[group].data_vars.items():
            np.testing.assert_array_equal(back[group][name], value)


def test_conversion_repeats_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first = gaussian().to_arviz(num_samples=10, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    again, other = gaussian().to_arviz(num_samples=10, seed=1), gaussian().to_arviz(num_samples=10, seed=2)
    np.testing.assert_array_equal(first.posterior_predictive.y, again.posterior_predictive.y)
    assert not np.array_equal(first.posterior.b2, other.posterior.b2)
