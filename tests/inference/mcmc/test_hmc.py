import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.mcmc import HMC as Protocol
from inference.mcmc.hmc import HMCKernel, prior_scale
from inference.target import compile_target
from tests.inference.mcmc.sampling import HMC, CorrelatedGaussian, draws_of, ensemble, transitions, z_scores
from tests.inference.mcmc.test_hamiltonian import conjugate, data, linear

TINY: dict[str, Any] = {"num_samples": 4, "warmup_steps": 0, "num_chains": 2, "step_size": 0.1, "compile": False}


@pytest.mark.parametrize("mass_matrix", ["diagonal", "dense", "identity"])
def test_hmc_has_the_moments_of_a_correlated_gaussian(mass_matrix: str) -> None:
    gaussian = CorrelatedGaussian()
    draws = draws_of(
        gaussian.log_density,
        torch.zeros(8, 10),
        HMC,
        num_samples=300,
        warmup_steps=200,
        seed=1,
        mass_matrix=mass_matrix,
        target_accept=0.651,
    )
    assert np.abs(z_scores(draws, gaussian.loc)).max() < 4
    assert np.abs(z_scores((draws - gaussian.loc).square(), gaussian.covariance.diagonal())).max() < 4


def test_rejected_proposals_repeat_the_state() -> None:
    starts = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    kernel = HMCKernel(trajectory_length=1.0, num_leapfrogs=3, jitter=0.0, max_leapfrogs=10)
    running = ensemble(
        lambda q: -0.5 * q.square().sum(),
        starts,
        kernel,
        num_samples=5,
        warmup_steps=0,
        step_size=50.0,
        adapt_step_size=False,
    )
    running.run()
    for record, start in zip(running.records, starts, strict=True):
        torch.testing.assert_close(record.draws, start.expand(5, 2), rtol=0, atol=0)
        assert [t.diverging for t in transitions(record)] == [True] * 5
        assert [t.acceptance for t in transitions(record)] == [0.0] * 5
        expected = torch.full((5,), float(-0.5 * start.square().sum()))
        torch.testing.assert_close(torch.tensor(record.stats["lp"]), expected)


def test_repeated_states_are_kept_among_the_draws() -> None:
    kernel = HMCKernel(trajectory_length=1.0, num_leapfrogs=2, jitter=0.0, max_leapfrogs=10)
    running = ensemble(
        lambda q: -0.5 * q.square().sum(),
        torch.zeros(4, 3),
        kernel,
        num_samples=400,
        warmup_steps=0,
        step_size=1.7,
        adapt_step_size=False,
        mass_matrix="identity",
    )
    running.run()
    draws = torch.stack([r.draws for r in running.records])
    repeated = (draws[:, 1:] == draws[:, :-1]).all(-1).double().mean()
    expected = 1 - np.mean([t.acceptance for r in running.records for t in transitions(r)])
    assert 0.1 < float(repeated) < 0.9
    assert float(repeated) == pytest.approx(expected, abs=0.05)
    assert np.abs(z_scores(draws.square(), torch.ones(3))).max() < 4


def test_number_of_leapfrogs_is_length_over_step_jittered_by_a_fifth() -> None:
    kernel = HMCKernel(trajectory_length=0.99, num_leapfrogs=None, jitter=0.2, max_leapfrogs=50)
    assert [kernel.length(0.1, u) for u in (1e-9, 0.5, 1.0)] == [8, 10, 12]
    assert kernel.length(1e-6, 0.5) == 50
    assert kernel.length(10.0, 0.5) == 1
    fixed = HMCKernel(trajectory_length=1.0, num_leapfrogs=10, jitter=0.2, max_leapfrogs=50)
    assert [fixed.length(0.001, u) for u in (1e-9, 0.5, 1.0)] == [8, 10, 12]


def test_hmc_spends_one_gradient_per_leapfrog() -> None:
    kernel = HMCKernel(trajectory_length=1.0, num_leapfrogs=7, jitter=0.0, max_leapfrogs=10)
    running = ensemble(
        lambda q: -0.5 * q.square().sum(),
        torch.ones(3, 2),
        kernel,
        num_samples=11,
        warmup_steps=0,
        step_size=0.1,
        adapt_step_size=False,
    )
    running.run()
    assert running.gradients == 3 * (1 + 7 * 11)


def test_a_quarter_period_forgets_the_start() -> None:
    kernel = HMCKernel(trajectory_length=math.pi / 2, num_leapfrogs=None, jitter=0.0, max_leapfrogs=1000)
    draws = draws_of(
        lambda q: -0.5 * q.square().sum(),
        torch.full((64, 1), 50.0),
        kernel,
        num_samples=1,
        warmup_steps=0,
        step_size=0.01,
        adapt_step_size=False,
    )
    assert abs(float(draws.mean())) < 4 / 8 + 0.5
    assert float(draws.std()) == pytest.approx(1.0, abs=0.4)


# -- the protocol of large full-batch studies ------------------------------------------------------------------------


def normal_prior(scale: float) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(50), scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w[:2], 1.0), obs=y)

    return model


@pytest.mark.parametrize("scale", [0.158, 1.0])
def test_the_trajectory_is_a_quarter_period_of_the_prior(scale: float) -> None:
    # The published run with prior precision 40, a standard deviation of 0.158, has trajectories of 0.248.
    x, y = data()
    posterior = Protocol(trajectory_length="prior", mass_matrix="identity", **TINY).fit(normal_prior(scale), x, y)
    found = posterior.info.extra["trajectory_length"]
    assert found == pytest.approx(0.5 * math.pi * scale, rel=0.05)
    assert posterior.backend.trajectory_length == "prior"


def test_the_prior_scale_is_the_geometric_mean_over_parameters_and_bears_heavy_tails() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(40), 0.1).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(40), 10.0).to_event(1))
        pyro.sample("c", dist.Cauchy(torch.zeros(40), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ a[:2], 1.0), obs=y)

    # Half the distance of the Cauchy's 16 % and 84 % quantiles.
    expected = (0.1 * 10.0 * math.tan(math.pi * 0.3413447461)) ** (1 / 3)
    assert prior_scale(compile_target(model, *data())) == pytest.approx(expected, rel=0.05)


def test_the_prior_trajectory_and_the_step_grow_with_the_root_of_the_temperature() -> None:
    x, y = data()
    found = {}
    for temperature in (1.0, 4.0):
        backend = Protocol(
            trajectory_length="prior",
            mass_matrix="identity",
            num_samples=20,
            warmup_steps=200,
            num_chains=8,
            temperature=temperature,
            compile=False,
        )
        extra = backend.fit(linear, x, y, seed=0).info.extra
        found[temperature] = extra["trajectory_length"], np.mean(extra["step_size"])
    assert found[4.0][0] / found[1.0][0] == pytest.approx(2.0, rel=1e-12)
    assert found[4.0][1] / found[1.0][1] == pytest.approx(2.0, rel=0.25)


def test_burn_in_without_rejection_accepts_what_did_not_diverge() -> None:
    def moved(burn_in: int) -> list[bool]:
        kernel = HMCKernel(1.0, num_leapfrogs=3, jitter=0.0, max_leapfrogs=10, burn_in_without_rejection=burn_in)
        running = ensemble(
            lambda q: -0.5 * q.square().sum(),
            torch.full((1, 40), 0.5),
            kernel,
            num_samples=12,
            warmup_steps=0,
            step_size=1.9,
            adapt_step_size=False,
        )
        running.run()
        draws = torch.cat([torch.full((1, 40), 0.5), running.records[0].draws])
        return (draws[1:] != draws[:-1]).any(-1).tolist()

    assert moved(12) == [True] * 12
    assert not all(moved(0))
    assert moved(5)[:5] == [True] * 5


def test_a_burn_in_that_diverges_stays_finite_and_recovers() -> None:
    x, y = data()
    backend = Protocol(
        burn_in_without_rejection=30, num_samples=100, warmup_steps=120, num_chains=8, mass_matrix="identity"
    )
    posterior = backend.fit(linear, x, y, seed=3)
    mean, covariance = conjugate(x, y)
    assert np.abs(z_scores(posterior.draws, mean)).max() < 4
    assert np.abs(z_scores((posterior.draws - mean).square(), covariance.diagonal())).max() < 4


@pytest.mark.parametrize(("integrator", "per_step"), [("leapfrog", 1.0), ("split", 1.5)])
def test_shards_give_the_posterior_and_count_their_gradients(integrator: str, per_step: float) -> None:
    x, y = data()
    fields = {"num_samples": 100, "warmup_steps": 100, "num_chains": 8, "compile": False}
    posterior = Protocol(num_shards=4, integrator=integrator, **fields).fit(linear, x, y, seed=1)
    mean, covariance = conjugate(x, y)
    assert np.abs(z_scores(posterior.draws, mean)).max() < 4
    assert np.abs(z_scores((posterior.draws - mean).square(), covariance.diagonal())).max() < 4
    steps = float(posterior.sample_stats["n_steps"].sum())
    assert posterior.info.gradients > per_step * steps


def test_accumulation_gives_the_draws_of_the_whole_data() -> None:
    x, y = data()
    fields = {"num_samples": 8, "warmup_steps": 0, "num_chains": 2, "step_size": 0.05, "adapt_step_size": False}
    whole = Protocol(**fields, compile=False).fit(linear, x, y, seed=1)
    sharded = Protocol(**fields, num_shards=3, compile=False).fit(linear, x, y, seed=1)
    torch.testing.assert_close(sharded.draws, whole.draws, rtol=0, atol=1e-9)
    assert sharded.info.gradients == whole.info.gradients


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trajectory_length": "posterior"}, "`trajectory_length` must be > 0 or \"prior\", got 'posterior'"),
        ({"trajectory_length": 0.0}, "`trajectory_length` must be > 0, got 0.0"),
        ({"trajectory_length": "prior"}, 'set `mass_matrix="identity"`'),
        ({"burn_in_without_rejection": 11, "warmup_steps": 10}, "`burn_in_without_rejection` must be <= "),
        ({"integrator": "split"}, '`num_shards` must be >= 2 for `integrator="split"`, got 1'),
        ({"integrator": "verlet"}, "`integrator` must be one of 'leapfrog', 'split', got 'verlet'"),
        ({"num_shards": 0}, "`num_shards` must be an integer >= 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be > 0, got 0.0"),
        ({"step_size": -0.1}, "`step_size` must be > 0, got -0.1"),
    ],
)
def test_bad_fields_are_refused_before_any_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Protocol(**fields)
