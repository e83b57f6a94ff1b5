import math

import numpy as np
import pytest
import torch

from inference.mcmc.hmc import HMCKernel
from tests.inference.mcmc.sampling import HMC, CorrelatedGaussian, draws_of, ensemble, z_scores


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
        assert [t.diverging for t in record.transitions] == [True] * 5
        assert [t.acceptance for t in record.transitions] == [0.0] * 5
        expected = torch.full((5,), float(-0.5 * start.square().sum()))
        torch.testing.assert_close(torch.tensor(record.log_densities), expected)


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
    expected = 1 - np.mean([t.acceptance for r in running.records for t in r.transitions])
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
