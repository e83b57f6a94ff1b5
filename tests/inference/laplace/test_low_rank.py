"""LowRankLaplace: all eigenpairs are the dense one, none the prior, and those in between the leading ones."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inference
from inference import DenseLaplace, LowRankLaplace
from inference.curvature import ggn, ggn_product
from inference.errors import ApproximationWarning
from inference.hessians import prior_precision_diagonal
from tests.cases import normal
from tests.networks import HAND_WRITTEN, NAMES, network
from tests.tolerances import z_limit

QUIET: dict[str, Any] = {"compile": False, "progress": False}
NOT_A_MODE = pytest.mark.filterwarnings("ignore::inference.errors.ApproximationWarning")


def _fit(name: str, **fields: Any) -> inference.GaussianPosterior:
    target, theta = network(name)
    found = LowRankLaplace(start=None, **fields, **QUIET).fit_to(target, init=theta)
    assert isinstance(found, inference.GaussianPosterior)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_products_with_the_ggn_are_those_of_the_matrix(name: str) -> None:
    target, theta = network(name)
    vector = torch.linspace(-1, 1, target.dim)
    expected = ggn(target, theta) @ vector
    torch.testing.assert_close(ggn_product(target, theta, vector), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ggn_product(target, theta, vector, chunk_bytes=1), expected, rtol=1e-9, atol=1e-9)


@NOT_A_MODE
def test_at_full_rank_it_is_dense_laplace() -> None:
    target, theta = network("learnt_noise")
    dense = DenseLaplace(start=None, **QUIET).fit_to(target, init=theta)
    full = _fit("learnt_noise", rank=target.dim)
    torch.testing.assert_close(full.gaussian.covariance(), dense.gaussian.covariance(), rtol=1e-7, atol=1e-9)
    assert full.log_evidence == pytest.approx(dense.log_evidence, abs=1e-8)
    found, expected = (p.predict(target.x).f_variance for p in (full, dense))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@NOT_A_MODE
def test_the_rank_of_the_data_is_as_good_as_all_of_it() -> None:
    target, theta = network("by_hand")  # 6 data of 3 logits: rank 12 of 43 parameters
    dense = DenseLaplace(start=None, **QUIET).fit_to(target, init=theta)
    found = _fit("by_hand", rank=18)
    torch.testing.assert_close(found.gaussian.covariance(), dense.gaussian.covariance(), rtol=1e-6, atol=1e-8)
    assert found.log_evidence == pytest.approx(dense.log_evidence, abs=1e-6)


@NOT_A_MODE
def test_at_rank_zero_it_is_the_prior() -> None:
    target, theta = network("by_hand")
    variance = 1 / prior_precision_diagonal(target, theta)
    torch.testing.assert_close(_fit("by_hand", rank=0).gaussian.covariance(), variance.diag())


@pytest.mark.parametrize("field", ["temperature", "likelihood_temperature"])
@NOT_A_MODE
def test_lanczos_keeps_the_leading_eigenpairs_of_the_whitened_curvature(field: str) -> None:
    target, theta = network("by_hand")
    prior = prior_precision_diagonal(target, theta)
    tempering = 3.0 if field == "likelihood_temperature" else 1.0
    values, vectors = torch.linalg.eigh(ggn(target, theta) / tempering / torch.outer(prior, prior).sqrt())
    kept = vectors[:, -4:] * prior.sqrt()[:, None]
    expected = torch.linalg.inv(prior.diag() + (kept * values[-4:]) @ kept.mT) * 3.0 / tempering
    found = _fit("by_hand", rank=4, **{field: 3.0})
    torch.testing.assert_close(found.gaussian.covariance(), expected, rtol=1e-6, atol=1e-8)
    assert found.info.extra["smallest_eigenvalue_kept"] == pytest.approx(float(values[-4]), rel=1e-6)


def test_a_direction_left_out_that_matters_is_said() -> None:
    def linear(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    x = torch.randn(50, 3)
    with pytest.warns(
        ApproximationWarning, match="smallest of 1 eigenvalues kept is .* prior precisions.*raise `rank`"
    ):
        LowRankLaplace(rank=1, **QUIET).fit(linear, x, x.sum(-1))


@NOT_A_MODE
def test_variances_fall_as_the_rank_grows() -> None:
    variances = [_fit("by_hand", rank=rank).gaussian.variance for rank in (0, 2, 5, 12)]
    for wider, narrower in zip(variances, variances[1:], strict=False):
        assert (narrower <= wider + 1e-12).all()
        assert narrower.sum() < 0.99 * wider.sum()


@NOT_A_MODE
def test_draws_have_the_stated_covariance() -> None:
    posterior = _fit("by_hand", rank=5)
    draws, covariance = posterior.sample(20_000, seed=2), posterior.gaussian.covariance()
    variance = covariance.diagonal()
    spread = torch.outer(variance, variance) + covariance.square()
    z = (draws.T.cov(correction=0) - covariance) / (spread / len(draws)).sqrt()
    assert z.abs().max() < z_limit(covariance.numel())


@NOT_A_MODE
def test_the_same_seed_gives_the_same_eigenpairs_and_a_file_keeps_them(tmp_path: Any) -> None:
    first, again = _fit("by_hand", rank=4), _fit("by_hand", rank=4)
    assert torch.equal(first.sample(3), again.sample(3))
    first.save(tmp_path)
    assert torch.equal(inference.load(tmp_path, HAND_WRITTEN["by_hand"]).sample(3), first.sample(3))


def test_a_flat_prior_is_refused_by_the_site() -> None:
    def flat(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        spare = pyro.sample("spare", dist.Laplace(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + spare, 0.5), obs=y)

    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match="must be positive, got 0 in site 'spare'"):
        LowRankLaplace(start=None, **QUIET).fit(flat, x, x.sum(-1), init=torch.full((4,), 0.3))


def test_memory_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.laplace.memory.available_bytes", lambda device: 3000)
    target, _ = network("by_hand")
    with pytest.raises(
        ValueError, match=r"LowRankLaplace of P = 43 .* use DiagonalLaplace\(\) \(1\.4e-06 GB\), Subset"
    ):
        LowRankLaplace(rank=10).fit_to(target)


@pytest.mark.parametrize("rank", [-1, 1.5, True])
def test_a_rank_is_a_whole_number_from_zero(rank: Any) -> None:
    with pytest.raises(ValueError, match=f"`rank` must be an integer >= 0, got {rank}"):
        LowRankLaplace(rank=rank)
