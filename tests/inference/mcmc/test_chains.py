import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inference.errors import NonFiniteError
from inference.mcmc.chain_backend import STREAM
from inference.mcmc.hamiltonian import _JITTER_STREAM
from inference.mcmc.lanes import Block, Transition
from inference.starting import random_stream
from tests.inference.mcmc.sampling import HMC, NUTS, CorrelatedGaussian, draws_of, ensemble, transitions, z_scores

KERNELS = pytest.mark.parametrize("kernel", [NUTS, HMC], ids=["nuts", "hmc"])


@KERNELS
def test_a_chain_does_not_depend_on_its_neighbours(kernel: object) -> None:
    gaussian = CorrelatedGaussian(4)
    starts = gaussian.sample(5)
    options = {"kernel": kernel, "num_samples": 15, "warmup_steps": 25, "mass_matrix": "dense"}
    together = draws_of(gaussian.log_density, starts, **options)
    for num in (1, 3):
        fewer = draws_of(gaussian.log_density, starts[:num], **options)
        torch.testing.assert_close(fewer, together[:num], rtol=1e-6, atol=1e-6)


@KERNELS
def test_chains_advanced_one_by_one_are_the_same(kernel: object) -> None:
    gaussian = CorrelatedGaussian(4)
    options = {"kernel": kernel, "num_samples": 15, "warmup_steps": 25}
    together = draws_of(gaussian.log_density, gaussian.sample(3), **options)
    apart = draws_of(gaussian.log_density, gaussian.sample(3), chains_per_block=1, **options)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


@KERNELS
def test_same_streams_give_the_same_draws_and_others_give_others(kernel: object) -> None:
    gaussian = CorrelatedGaussian(4)
    options = {"kernel": kernel, "num_samples": 20, "warmup_steps": 20}
    first = draws_of(gaussian.log_density, gaussian.sample(3), **options)
    state = torch.get_rng_state()
    again = draws_of(gaussian.log_density, gaussian.sample(3), **options)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    other = draws_of(gaussian.log_density, gaussian.sample(3), seed=1, **options)
    assert not torch.isclose(other, first).any()
    assert len(torch.unique(first[:, -1, 0])) == 3


def wide_or_narrow(theta: Tensor) -> Tensor:
    """A chain that starts at +200 needs trajectories twenty times as long as one that starts at -200."""
    return -0.5 * ((theta.abs() - 200) / torch.where(theta > 0, 10.0, 0.5)).square().sum()


FIXED = {"step_size": 0.3, "adapt_step_size": False, "mass_matrix": "identity", "warmup_steps": 0}


def test_chains_do_not_wait_for_the_deepest() -> None:
    running = ensemble(wide_or_narrow, torch.tensor([[200.0], [-200.0]]), num_samples=100, **FIXED)
    running.run()
    long, short = (sum(t.num_steps for t in transitions(r)) for r in running.records)
    assert long > 5 * short
    assert running.gradients == 2 + long + short


def test_finished_chains_are_left_behind() -> None:
    starts = torch.tensor([[200.0], [-200.0], [-200.5]])
    running = ensemble(wide_or_narrow, starts, num_samples=60, **FIXED)
    sizes = []
    original = running._regroup

    def regroup(block: Block) -> None:
        original(block)
        sizes.extend(len(b.lanes) for b in running.blocks)

    running._regroup = regroup  # type: ignore[method-assign]
    running.run()
    assert sizes[0] == 2
    assert sizes[1] == 1
    assert running.blocks == []
    assert [len(r) for r in running.records] == [60, 60, 60]
    alone = draws_of(wide_or_narrow, starts[:1], num_samples=60, **FIXED)
    torch.testing.assert_close(running.records[0].draws, alone[0], rtol=1e-6, atol=1e-6)


@KERNELS
def test_an_interrupt_keeps_the_draws_so_far(kernel: object) -> None:
    seen = 0

    def observe(transition: Transition, step_size: float) -> None:
        nonlocal seen
        seen += 1
        if seen == 150:
            raise KeyboardInterrupt

    gaussian = CorrelatedGaussian(4)
    options = {"kernel": kernel, "num_samples": 100, "warmup_steps": 5}
    running = ensemble(gaussian.log_density, gaussian.sample(2), observe=observe, **options)
    running.run()
    assert running.stopped == "an interrupt"
    assert all(0 < len(r) < 100 for r in running.records)
    whole = draws_of(gaussian.log_density, gaussian.sample(2), **options)
    for record, full in zip(running.records, whole, strict=True):
        torch.testing.assert_close(record.draws[: len(record)], full[: len(record)], rtol=1e-6, atol=1e-6)


def test_a_time_limit_stops_the_run() -> None:
    gaussian = CorrelatedGaussian(4)
    running = ensemble(gaussian.log_density, gaussian.sample(2), num_samples=10**5, warmup_steps=0)
    running.run(max_seconds=0.5)
    assert running.stopped == "max_seconds=0.5"
    assert 0 < min(len(r) for r in running.records) < 10**5


def test_a_density_that_is_not_finite_at_the_start_is_an_error() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        running = ensemble(lambda q, bad=bad: q.sum() * 0 + bad, torch.ones(2, 1), num_samples=2, warmup_steps=2)
        with pytest.raises(NonFiniteError, match="chain 0, step 0"):
            running.run()


def test_a_gradient_that_is_not_finite_at_the_start_is_an_error() -> None:
    running = ensemble(lambda q: q.abs().sqrt().sum(), torch.zeros(1, 1), num_samples=2, warmup_steps=2)
    with pytest.raises(NonFiniteError, match="gradient"):
        running.run()


def test_a_flat_density_is_an_error_that_says_so() -> None:
    running = ensemble(lambda q: 0.0 * q.sum(), torch.ones(1, 2), num_samples=2, warmup_steps=2)
    with pytest.raises(NonFiniteError, match="is the posterior proper"):
        running.run()


def gamma(theta: Tensor) -> Tensor:
    return 2 * torch.log(theta[0]) - theta[0]


@KERNELS
def test_a_density_that_is_not_finite_later_is_a_divergence(kernel: object) -> None:
    running = ensemble(
        gamma,
        torch.full((8, 1), 3.0),
        kernel,  # type: ignore[arg-type]
        num_samples=300,
        warmup_steps=50,
        step_size=0.8,
        adapt_step_size=False,
        mass_matrix="identity",
    )
    running.run()
    draws = torch.stack([r.draws for r in running.records])
    assert sum(t.diverging for r in running.records for t in transitions(r)) > 0
    assert bool((draws > 0).all())
    assert np.abs(z_scores(draws, torch.tensor([3.0]))).max() < 4


def test_chains_run_in_float32() -> None:
    running = ensemble(
        lambda q: -0.5 * q.double().square().sum(),
        torch.zeros(8, 5, dtype=torch.float32),
        num_samples=150,
        warmup_steps=100,
    )
    running.run()
    draws = torch.stack([r.draws for r in running.records])
    assert draws.dtype == torch.float32
    assert np.abs(z_scores(draws.double().square(), torch.ones(5))).max() < 4


def test_no_stream_of_a_chain_is_one_of_another_seed() -> None:
    # seeds are a million and three streams apart: numbers beyond that would be those of the next seed
    indices = [*range(20), *(STREAM + c for c in range(20)), *(_JITTER_STREAM + c for c in range(20))]
    found = [random_stream(seed, index).initial_seed() for seed in range(4) for index in indices]
    assert len(set(found)) == len(found)
