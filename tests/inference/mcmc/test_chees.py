import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import MAP, ChEESHMC, ConvergenceWarning, DivergenceWarning
from inference.mcmc.chees_adaptation import Adaptation, criterion_gradient, halton
from inference.mcmc.chees_chains import ChEESChains
from inference.mcmc.lanes import DIVERGENCE
from tests.inference.mcmc.lockstep import chees, draw, problem
from tests.inference.mcmc.sampling import CorrelatedGaussian, z_scores
from tests.inference.mcmc.test_hamiltonian import data, interrupt_after, linear

SD = torch.tensor([1.0, 10.0], dtype=torch.float64)
START = MAP(num_steps=20, polish=False, compile=False)
SHORT: dict[str, Any] = {"num_samples": 20, "warmup_steps": 30, "num_chains": 4, "start": START, "compile": False}
FIXED: dict[str, Any] = {**SHORT, "adapt": False, "step_size": 0.1, "trajectory_length": 0.5}


def stretched(theta: Tensor) -> Tensor:
    return -0.5 * (theta / SD).square().sum()


def points(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))


def test_the_halton_sequence_is_the_known_one() -> None:
    assert [halton(i) for i in range(7)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert np.mean([halton(i) for i in range(1023)]) == pytest.approx(0.5, abs=1e-3)


def on_the_exact_trajectory(time: float, sd: float, num: int = 400_000) -> tuple[Tensor, Tensor, Tensor]:
    """Positions before and after the harmonic motion of N(0, sd^2) at stationarity, and velocities."""
    generator = torch.Generator().manual_seed(0)
    start = sd * torch.randn(num, 1, generator=generator)
    momentum = torch.randn(num, 1, generator=generator)
    angle = time / sd
    end = start * math.cos(angle) + sd * momentum * math.sin(angle)
    return start, end, momentum * math.cos(angle) - start / sd * math.sin(angle)


@pytest.mark.parametrize("time", [0.5, 2.0, 4.0])
def test_the_gradient_is_that_of_the_criterion_in_closed_form(time: float) -> None:
    # ChEES(t) = sd^4 sin(t / sd)^2 on N(0, sd^2), without jitter.
    sd = 2.0
    start, end, velocity = on_the_exact_trajectory(time, sd)
    found = criterion_gradient(start, end, velocity, torch.ones(len(start)), time)
    expected = sd**4 * math.sin(2 * time / sd) * time / sd
    assert found == pytest.approx(expected, abs=0.03 * sd**4 * max(time, 1.0))


def test_rejected_proposals_do_not_count() -> None:
    start, end, velocity = on_the_exact_trajectory(1.0, 2.0, num=100)
    odd = torch.cat([end[:50], 1e6 * end[50:]])
    acceptance = torch.cat([torch.ones(50), torch.zeros(50)])
    found = criterion_gradient(start[:50], end[:50], velocity[:50], acceptance[:50], 1.0)
    centred = criterion_gradient(start, odd, velocity, acceptance, 1.0, centres=torch.zeros_like(start))
    plain = criterion_gradient(start[:50], end[:50], velocity[:50], acceptance[:50], 1.0, centres=torch.zeros(50, 1))
    assert centred == pytest.approx(plain, rel=1e-10)
    assert math.isfinite(found)


@pytest.mark.parametrize(
    ("jitter", "expected", "low", "high"),
    # Quarter period of the widest direction without jitter (15.7); with it, where tan(2T/sd) = 2T/sd (22.5).
    [(0.0, 0.5 * math.pi * 10, 12.0, 20.0), (1.0, 0.5 * 4.4934 * 10, 18.0, 26.0)],
)
def test_the_length_becomes_the_one_of_the_widest_direction(
    jitter: float, expected: float, low: float, high: float
) -> None:
    options = ChEESHMC(num_chains=64, warmup_steps=1500, num_samples=100, jitter=jitter)
    sampler = chees(stretched, points(64), options)
    assert low < sampler.length < high
    # Rounding up adds half a step to a trajectory on average.
    assert sampler.length + 0.5 * sampler.step_size == pytest.approx(expected, rel=0.1)
    assert 1.1 < sampler.step_size < 1.7
    draws, stats = draw(sampler, 100)
    assert np.abs(z_scores(draws, torch.zeros(2))).max() < 4
    assert np.abs(z_scores(draws.square(), SD.square())).max() < 4
    assert 0.55 < float(stats["acceptance_rate"].mean()) < 0.95


def test_the_harmonic_mean_of_the_acceptance_reaches_its_target() -> None:
    options = ChEESHMC(num_chains=32, warmup_steps=300, target_accept=0.8)
    gaussian = CorrelatedGaussian()
    sampler = chees(gaussian.log_density, gaussian.sample(32), options)
    _, stats = draw(sampler, 60)
    harmonic = 1.0 / (1.0 / stats["acceptance_rate"].clamp_min(1e-20)).mean(0)
    assert float(harmonic.mean()) == pytest.approx(0.8, abs=0.1)


def test_pooled_variances_become_the_mass() -> None:
    options = ChEESHMC(num_chains=32, warmup_steps=400, mass_matrix="diagonal")
    sampler = chees(stretched, points(32), options)
    torch.testing.assert_close(sampler.scale, SD, rtol=0.1, atol=0)
    # In units of the scales all directions have the standard deviation 1.
    assert 1.2 < sampler.length < 4.0
    draws, _ = draw(sampler, 100)
    assert np.abs(z_scores(draws.square(), SD.square())).max() < 4


def two_modes(theta: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack([-0.5 * (theta - m).square().sum() for m in (-30.0, 30.0)]), 0)


def test_centring_each_chain_forgives_chains_in_different_modes() -> None:
    starts = torch.cat([points(16) - 30, points(16, seed=1) + 30])
    lengths = {}
    for centre in ("pooled", "chain"):
        options = ChEESHMC(num_chains=32, warmup_steps=400, centre=centre, max_leapfrogs=50)
        sampler = chees(two_modes, starts, options)
        lengths[centre] = sampler.length + 0.5 * sampler.step_size
    # One mode alone is a standard normal: 2.25. Seen from far off, distances are displacements: where tan(T) = T.
    assert lengths["chain"] == pytest.approx(2.25, rel=0.25)
    assert lengths["pooled"] == pytest.approx(4.49, rel=0.25)


def test_energy_errors_at_stationarity_have_the_mean_of_an_exact_sampler() -> None:
    gaussian = CorrelatedGaussian()
    starts = gaussian.sample(4000)
    options = ChEESHMC(num_chains=4000, warmup_steps=0, adapt=False, step_size=0.35, trajectory_length=2.0, jitter=0.0)
    sampler = ChEESChains(options, problem(gaussian.log_density, starts))
    with torch.no_grad():
        before, _, after = sampler._integrate(6, 0.35)
    weights = torch.exp(before - after)
    error = float(weights.std()) / math.sqrt(len(weights))
    assert 0.001 < error < 0.1
    assert abs(float(weights.mean()) - 1) < 4 * error


def test_rejected_chains_stay_where_they_are() -> None:
    options = ChEESHMC(num_chains=3, warmup_steps=0, adapt=False, step_size=50.0, trajectory_length=150.0, jitter=0.0)
    starts = points(3)
    sampler = chees(lambda q: -0.5 * q.square().sum(), starts, options)
    draws, stats = draw(sampler, 4)
    torch.testing.assert_close(draws, starts[:, None].expand(3, 4, 2), rtol=0, atol=0)
    assert bool(stats["diverging"].all())
    assert float(stats["acceptance_rate"].max()) == 0.0
    torch.testing.assert_close(stats["lp"][:, 0], -0.5 * starts.square().sum(-1))
    assert DIVERGENCE == 1000.0


def test_adaptation_keeps_averages_and_clips_the_updates() -> None:
    options = ChEESHMC(learning_rate=10.0)
    adaptation = Adaptation(0.5, 2.0, options)
    adaptation.update(torch.full((4,), 0.651), 1.0)
    assert adaptation.length == pytest.approx(2.0 * math.exp(0.35))
    assert adaptation.log_length == pytest.approx(math.log(adaptation.length))
    first = adaptation.log_length
    adaptation.update(torch.full((4,), 0.651), -1.0)
    assert adaptation.log_length == pytest.approx(first + 2**-0.5 * (math.log(adaptation.length) - first))
    before = adaptation.length
    adaptation.update(torch.zeros(0), math.nan)
    assert adaptation.length == before
    assert math.isfinite(adaptation.log_step_size)


def test_all_chains_start_from_one_mode() -> None:
    x, y = data()
    backend = ChEESHMC(
        num_samples=4,
        warmup_steps=0,
        num_chains=6,
        adapt=False,
        step_size=1e-6,
        trajectory_length=1e-6,
        start=MAP(num_steps=200, compile=False),
        compile=False,
    )
    posterior = backend.fit(linear, x, y, seed=0)
    mode = MAP(num_steps=200, compile=False).fit(linear, x, y).mean_theta
    offset = posterior.draws[:, 0] - mode
    assert 0.003 < float(offset.std()) < 0.03
    assert len(torch.unique(offset, dim=0)) == 6


def test_sample_statistics_have_the_names_of_arviz() -> None:
    x, y = data()
    posterior = ChEESHMC(**SHORT).fit(linear, x, y, seed=0)
    stats = posterior.sample_stats
    assert set(stats) == {"diverging", "n_steps", "acceptance_rate", "energy", "lp", "step_size"}
    assert {tuple(v.shape) for v in stats.values()} == {(4, 20)}
    expected = torch.stack([torch.stack([posterior.target.log_density(t) for t in chain]) for chain in posterior.draws])
    torch.testing.assert_close(stats["lp"], expected, rtol=0, atol=1e-9)
    assert bool((stats["energy"] >= -stats["lp"]).all())
    assert posterior.info.gradients >= 4 * stats["n_steps"][0].sum()
    assert set(posterior.info.extra) >= {"step_size", "trajectory_length", "warmup_divergences"}


def test_thinned_trajectories_add_up() -> None:
    x, y = data()
    posterior = ChEESHMC(**{**FIXED, "thinning": 4, "jitter": 0.0}).fit(linear, x, y, seed=0)
    assert posterior.draws.shape == (4, 5, 2)
    assert posterior.sample_stats["n_steps"].unique().tolist() == [20]


def test_a_checkpoint_goes_on_to_the_same_draws(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    settings = {**SHORT, "num_samples": 30, "start": None, "checkpoint_every": 4}
    whole = ChEESHMC(**settings).fit(linear, x, y, seed=0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4 * (30 + 11))
        with pytest.warns(ConvergenceWarning, match="after 11 of 30 draws a chain"):
            ChEESHMC(**settings, checkpoint=tmp_path).fit(linear, x, y, seed=0)
    resumed = ChEESHMC(**settings, checkpoint=tmp_path).fit(linear, x, y, seed=0)
    torch.testing.assert_close(resumed.draws, whole.draws, rtol=0, atol=0)
    assert resumed.info.gradients == whole.info.gradients


def test_an_interrupt_during_warmup_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    interrupt_after(monkeypatch, 4 * 10)
    with pytest.raises(KeyboardInterrupt, match=r"10 of 30 warm-up iterations"):
        ChEESHMC(**{**SHORT, "start": None}).fit(linear, x, y, seed=0)


def test_divergences_warn_with_their_number() -> None:
    x, y = data()
    with pytest.warns(DivergenceWarning, match=r"80 of 80 draws diverged \(100 %\).*raise `target_accept`"):
        ChEESHMC(**{**FIXED, "step_size": 50.0, "trajectory_length": 500.0, "jitter": 0.0}).fit(linear, x, y, seed=0)


def test_trajectories_that_are_cut_short_warn_with_their_share() -> None:
    x, y = data()
    backend = ChEESHMC(**{**FIXED, "trajectory_length": 10.0, "max_leapfrogs": 3, "jitter": 0.0})
    with pytest.warns(ConvergenceWarning, match="100 % of the trajectories had max_leapfrogs=3"):
        backend.fit(linear, x, y, seed=0)


def test_a_mean_acceptance_far_below_its_target_warns() -> None:
    x, y = data()
    with (
        pytest.warns(DivergenceWarning),
        pytest.warns(ConvergenceWarning, match=r"the mean acceptance is 0\.\d+, where a harmonic mean of 0.9"),
    ):
        ChEESHMC(**{**SHORT, "warmup_steps": 1, "target_accept": 0.9, "step_size": 0.9}).fit(linear, x, y, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_chains": 1}, "`num_chains`=1: R-hat compares chains"),
        (
            {"num_chains": 1, "allow_one_chain": True},
            "`num_chains` must be >= 2 where the length is learnt across chains, got 1",
        ),
        ({"warmup_steps": 0}, "`warmup_steps` must be >= 1 where step size and length are learnt, got 0"),
        ({"adapt": False, "step_size": 0.1}, "give both, got 0.1 and None"),
        ({"temperature": 0.0}, "`temperature` must be > 0, got 0.0"),
        ({"step_size": -0.1}, "`step_size` must be > 0, got -0.1"),
        ({"target_accept": 1.0}, "`target_accept` must be between 0 and 1, got 1.0"),
        ({"jitter": 1.5}, r"`jitter` must be in \[0, 1\], got 1.5"),
        ({"mass_matrix": "dense"}, "`mass_matrix` must be one of 'identity', 'diagonal', got 'dense'"),
        ({"centre": "mode"}, "`centre` must be one of 'pooled', 'chain', got 'mode'"),
    ],
)
def test_bad_fields_are_refused_before_any_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChEESHMC(**fields)


@pytest.mark.slow
def test_compiled_chains_are_the_eager_ones() -> None:
    x, y = data()
    fits = [ChEESHMC(**{**SHORT, "mass_matrix": "diagonal", "compile": c}).fit(linear, x, y) for c in (True, False)]
    torch.testing.assert_close(fits[0].draws, fits[1].draws, rtol=0, atol=1e-9)
