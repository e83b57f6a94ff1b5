"""Simulation-based calibration: uniform for an exact posterior, and not for narrowed, shifted or lazy ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bnn_models import MLP, likelihoods, priors
from inference import MAP, NUTS, DeepEnsemble
from inference.backend import Backend, Run
from inference.distributions import DenseGaussian
from inference.errors import NonFiniteError
from inference.posterior import DrawsPosterior, GaussianPosterior, Posterior
from inference.sbc import Calibration, Scalars, calibrate, randomised_ranks, scalar_draws, simulate
from inference.target import Target, compile_target
from inference.uniformity import uniformity
from tests.cases import CASES
from tests.conjugate import linear_regression

PROBLEM = linear_regression(num=15)
PROBES = PROBLEM.x[:3]


@dataclass(frozen=True, kw_only=True)
class Exact(Backend):
    """The conjugate posterior of :func:`tests.conjugate.linear_regression`, or a wrong one of it.

    Attributes:
        narrow: Factor of the standard deviations.
        shift: Added to the mean, in standard deviations.
        lazy: Return the prior instead.
    """

    narrow: float = 1.0
    shift: float = 0.0
    lazy: bool = False

    def fit_target(self, target: Target, run: Run) -> Posterior:
        precision = target.x.T @ target.x / 0.25 + torch.eye(3) / 1.5**2
        covariance = torch.linalg.inv(precision)
        mean = covariance @ target.x.T @ target.y / 0.25
        if self.lazy:
            mean, covariance = torch.zeros(3), 1.5**2 * torch.eye(3)
        mean = mean + self.shift * covariance.diagonal().sqrt()
        return GaussianPosterior(target, DenseGaussian.from_covariance(mean, self.narrow**2 * covariance), backend=self)


@dataclass(frozen=True, kw_only=True)
class Sticky(Exact):
    """A chain with the conjugate posterior as its law and every draw repeated."""

    repeats: int = 1
    capabilities: ClassVar[frozenset[str]] = frozenset({"chains"})

    def fit_target(self, target: Target, run: Run) -> Posterior:
        draws = super().fit_target(target, run).sample(400, run.seed)
        return DrawsPosterior(target, draws.repeat_interleave(self.repeats, 0).unsqueeze(0), backend=self)


def calibrated(backend: Backend, num: int = 200, **options: Any) -> Calibration:
    return calibrate(backend, PROBLEM.model, PROBLEM.x, PROBLEM.y, probes=PROBES, num_replicates=num, **options)


def smallest(found: Calibration) -> float:
    """Smallest p-value over scalars, corrected for their number."""
    tests = [uniformity(name, found.pit[:, i]) for i, name in enumerate(found.names)]
    return min(1.0, len(tests) * min(t.pvalue for t in tests))


def test_the_exact_conjugate_posterior_is_uniform_and_its_scalars_are_named() -> None:
    found = calibrated(Exact())
    assert smallest(found) > 0.01
    assert found.names == ("w[0]", "w[1]", "w[2]", "f[0]", "f[1]", "f[2]", "log likelihood")
    assert found.pit.shape == (200, 7)
    assert found.num_draws == 99
    assert not found.failures


@pytest.mark.parametrize(
    ("change", "shape"),
    [({"narrow": 0.6}, "too narrow"), ({"narrow": 1.8}, "too wide"), ({"shift": 0.6}, "shifted up")],
)
def test_a_deliberately_wrong_posterior_fails_with_its_shape(change: dict[str, float], shape: str) -> None:
    found = calibrated(Exact(**change), num=120)  # type: ignore[arg-type]
    test = uniformity("w[0]", found.pit[:, 0])
    assert test.pvalue < 1e-4
    assert test.shape == shape


def test_a_posterior_that_ignores_the_data_is_seen_by_the_log_likelihood_alone() -> None:
    found = calibrated(Exact(lazy=True))
    tests = {name: uniformity(name, found.pit[:, i]) for i, name in enumerate(found.names)}
    assert tests["log likelihood"].pvalue < 1e-10
    assert min(t.pvalue for name, t in tests.items() if name != "log likelihood") > 1e-3


def test_repeated_draws_are_thinned_to_their_effective_size_and_stay_uniform() -> None:
    found = calibrated(Sticky(repeats=10), num=100)
    assert smallest(found) > 0.01
    sizes = [r.num_draws for r in found.replicates]
    assert max(sizes) == 99
    sticky = Sticky(repeats=20)
    target = compile_target(PROBLEM.model, PROBLEM.x, PROBLEM.y)
    short = DrawsPosterior(target, sticky.fit_to(target, seed=1).draws[:, :800], backend=sticky)
    values, ess = scalar_draws(short, Scalars(target, PROBES), 99, seed=0)
    assert ess < 60  # of 800 draws, 40 of them distinct
    assert len(values) == int(ess)


def test_a_point_is_ranked_as_equal_draws_and_members_as_they_are() -> None:
    target = compile_target(PROBLEM.model, PROBLEM.x, PROBLEM.y)
    scalars = Scalars(target, PROBES)
    point = MAP(num_steps=5, compile=False).fit_to(target)
    assert scalar_draws(point, scalars, 99, seed=0)[0].shape == (99, 7)
    members = DeepEnsemble(num_members=4, num_steps=5, compile=False).fit_to(target)
    values, ess = scalar_draws(members, scalars, 99, seed=0)
    assert values.shape == (4, 7)
    assert math.isnan(ess)
    torch.testing.assert_close(values[:, :3], members.flat_draws)  # type: ignore[attr-defined]


def test_randomised_ranks_count_draws_below_and_break_ties_at_random() -> None:
    draws = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    found = np.stack([randomised_ranks(draws, torch.tensor([1.5, 1.0]), seed) for seed in range(4000)])
    assert found[:, 0].min() > 0.5
    assert found[:, 0].max() < 0.75  # two below: (2 + U) / 4
    assert found[:, 1].mean() == pytest.approx(0.5, abs=0.02)  # three ties: anywhere
    assert found[:, 1].min() < 0.01


def test_simulated_data_have_the_marginal_law_of_the_model() -> None:
    base = compile_target(PROBLEM.model, PROBLEM.x, PROBLEM.y)
    made = [simulate(base, seed) for seed in range(600)]
    y = torch.stack([target.y for target, _ in made])
    marginal = 1.5**2 * PROBLEM.x @ PROBLEM.x.T + 0.25 * torch.eye(15)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(marginal), y.T, upper=False)
    assert float(whitened.square().mean()) == pytest.approx(1, abs=5 * (2 / whitened.numel()) ** 0.5)
    theta = torch.stack([theta for _, theta in made])
    assert float(theta.square().mean()) == pytest.approx(2.25, rel=0.15)
    assert made[0][0].programs is base.programs  # nothing is recorded again
    torch.testing.assert_close(base.y, PROBLEM.y, rtol=0, atol=0)


def test_weights_of_a_network_are_looked_at_through_scalars_that_swaps_do_not_change() -> None:
    model = MLP([3, 4, 1], prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(0.3))
    target = compile_target(model, PROBLEM.x, PROBLEM.y)
    scalars = Scalars(target, PROBES)
    assert scalars.names[:4] == (
        "mean square of layers.0.weight",
        "mean square of layers.0.bias",
        "mean square of layers.1.weight",
        "layers.1.bias",
    )
    from inference.symmetry import hidden_units

    theta = target.sample_prior(3, seed=0)
    (group,) = hidden_units(target)
    moved = group.moved(theta, torch.tensor([2, 0, 3, 1]).expand(3, 4), -torch.ones(3, 4))
    torch.testing.assert_close(scalars(target, moved), scalars(target, theta))


@pytest.mark.parametrize("name", ["categorical", "poisson", "local_effects", "dict_inputs"])
def test_models_of_every_kind_can_be_simulated_and_ranked(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    backend = NUTS(num_samples=6, warmup_steps=3, num_chains=2, max_tree_depth=2, step_size=0.05, compile=False)
    found = calibrate(backend, case.model(), case.x, case.y, num_replicates=2)
    assert found.pit.shape == (2, len(found.names))
    assert ((found.pit > 0) & (found.pit < 1)).all()


def test_replicates_do_not_depend_on_the_workers_and_progress_counts_them() -> None:
    seen: list[tuple[int, int]] = []
    alone = calibrated(Exact(), num=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)]
    fewer = calibrated(Exact(), num=4)
    np.testing.assert_array_equal(fewer.pit, alone.pit[:4])
    assert not np.array_equal(calibrated(Exact(), num=4, seed=1).pit, fewer.pit)


@pytest.mark.slow
def test_worker_processes_give_the_same_ranks() -> None:
    model = MLP([3, 1], prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(0.5))
    backend = NUTS(num_samples=20, warmup_steps=20, num_chains=2, compile=False, progress=False)
    alone, shared = (calibrate(backend, model, PROBLEM.x, PROBLEM.y, num_replicates=5, n_jobs=jobs) for jobs in (1, 2))
    np.testing.assert_allclose(shared.pit, alone.pit, rtol=1e-10)


def test_replicates_that_end_in_a_non_finite_density_are_kept_as_failures() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Fails(Exact):
        def fit_target(self, target: Target, run: Run) -> Posterior:
            if target.y.sum() > 0:
                raise NonFiniteError("step 3: log density nan")
            return super().fit_target(target, run)

    found = calibrated(Fails(), num=10)
    assert 0 < len(found.failures) < 10
    assert len(found.failures) + len(found.pit) == 10
    assert found.failures[0].endswith("step 3: log density nan")


@pytest.mark.parametrize("name", ["num_replicates", "num_draws", "n_jobs"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1, got 0"):
        calibrate(Exact(), PROBLEM.model, PROBLEM.x, PROBLEM.y, **{name: 0})


def test_a_scalar_model_without_layers_is_ranked_by_its_site() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    target = compile_target(model, torch.arange(3.0), torch.ones(3))
    assert Scalars(target, torch.ones(1)).names == ("w", "f[0]", "log likelihood")
