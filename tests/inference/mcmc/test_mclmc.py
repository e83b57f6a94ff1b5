import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import MAP, MCLMC, ConvergenceWarning
from inference.backend import Bar
from inference.mcmc.microcanonical import Microcanonical, tuned
from inference.target import compile_target
from tests.inference.mcmc.lockstep import draw, microcanonical, problem, tuning
from tests.inference.mcmc.sampling import CorrelatedGaussian, z_scores
from tests.inference.mcmc.test_hamiltonian import data, interrupt_after, linear

SHORT: dict[str, Any] = {"num_samples": 20, "warmup_steps": 60, "num_chains": 2, "thinning": 2, "compile": False}


def normal(theta: Tensor) -> Tensor:
    return -0.5 * theta.square().sum()


def test_tuned_chains_have_the_moments_of_a_correlated_gaussian() -> None:
    gaussian = CorrelatedGaussian()
    sampler = microcanonical(gaussian.log_density, gaussian.sample(16), tuning(0.8, 3.2, (300, 300, 0, 300)), 3)
    draws, stats = draw(sampler, 300)
    assert np.abs(z_scores(draws, gaussian.loc)).max() < 4
    assert np.abs(z_scores((draws - gaussian.loc).square(), gaussian.covariance.diagonal())).max() < 4
    assert not bool(stats["diverging"].any())


def test_warm_up_reaches_the_energy_error_it_aims_at() -> None:
    starts = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    sampler = microcanonical(normal, starts, tuning(0.3, 5.5, (200, 200, 0, 0)))
    draw(sampler, 400)
    found = torch.tensor(sampler.report()["energy_variance"])
    assert float(found.mean()) == pytest.approx(5e-4, rel=0.5)
    # The second phase: the root of the summed variances, 30 of them of 1.
    assert float(sampler.length.mean()) == pytest.approx(math.sqrt(30), rel=0.15)


def test_a_smaller_goal_gives_a_smaller_step_by_the_sixth_root() -> None:
    starts = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    tunings = [tuning(1.0, 5.5, (400, 0, 0, 0), first_goal=g, last_goal=g) for g in (1e-3, 1e-5)]
    steps = [float(microcanonical(normal, starts, t).step_size.mean()) for t in tunings]
    assert steps[0] / steps[1] == pytest.approx(100 ** (1 / 6), rel=0.15)


def test_the_length_is_found_from_the_autocorrelations() -> None:
    gaussian = CorrelatedGaussian()
    sampler = microcanonical(gaussian.log_density, gaussian.sample(4), tuning(0.8, 50.0, (200, 0, 0, 400)))
    assert bool((sampler.length < 25.0).all())
    assert bool((sampler.length > 0.5).all())


def test_preconditioning_finds_the_scales() -> None:
    scales = torch.logspace(-0.5, 0.5, 20)
    starts = scales * torch.randn(4, 20, generator=torch.Generator().manual_seed(0))

    def stretched(theta: Tensor) -> Tensor:
        return -0.5 * (theta / scales).square().sum()

    scaled = microcanonical(stretched, starts, tuning(0.5, 5.0, (150, 500, 100, 0), precondition=True))
    ratio = scaled.scale / scales
    assert bool(((ratio > 0.5) & (ratio < 2.0)).all())
    torch.testing.assert_close(scaled.length, torch.full((4,), math.sqrt(20)))
    # In units of the scales a step is as long as on a standard normal, whose standard deviation is 1.
    assert float(scaled.step_size.min()) > 1.0
    draws, _ = draw(scaled, 400)
    assert np.abs(z_scores((draws / scales).square(), torch.ones(20))).max() < 5


def test_the_tuner_is_the_published_recursion() -> None:
    settings, generator = tuning(1.0, 1.0, (1, 0, 0, 0)), torch.Generator().manual_seed(0)
    tuner = torch.tensor([[0.7, math.inf, 0.0, 0.0, 0.0]])
    step_size, ceiling, total, weight = 0.7, math.inf, 0.0, 0.0
    decay = 149 / 151
    for n in range(40):
        error, finite = float(torch.randn((), generator=generator)), n != 20
        error = error if finite else 0.0
        tuner = tuned(tuner, torch.tensor([error]), torch.tensor([finite]), torch.tensor(5e-4), 10, settings)
        xi = error**2 / (10 * 5e-4) + 1e-8
        own = math.exp(-0.5 * (math.log(xi) / 9) ** 2)
        ceiling = ceiling if finite else 0.8 * step_size
        total, weight = decay * total + own * xi / step_size**6, decay * weight + own
        step_size = min((total / weight) ** (-1 / 6), ceiling)
        assert float(tuner[0, 0]) == pytest.approx(step_size, rel=1e-10)
    assert float(tuner[0, 1]) == pytest.approx(ceiling)


def test_a_chain_tunes_itself_whatever_runs_beside_it() -> None:
    starts = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    few = microcanonical(normal, starts[:2], tuning(0.5, 2.0, (40, 40, 0, 40)))
    many = microcanonical(normal, starts, tuning(0.5, 2.0, (40, 40, 0, 40)))
    torch.testing.assert_close(few.step_size, many.step_size[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close(few.length, many.length[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close(draw(few, 5)[0], draw(many, 5)[0][:2], rtol=1e-8, atol=1e-8)
    assert len(torch.unique(many.step_size)) == 3


def test_thinning_keeps_every_third_step() -> None:
    starts = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    all_steps, _ = draw(microcanonical(normal, starts, tuning(0.5, 2.0)), 9)
    thinned, stats = draw(microcanonical(normal, starts, tuning(0.5, 2.0), thinning=3), 3)
    torch.testing.assert_close(thinned, all_steps[:, 2::3], rtol=0, atol=0)
    assert stats["n_steps"].unique().tolist() == [3]


def test_one_parameter_gets_a_companion_that_leaves_it_alone() -> None:
    sampler = microcanonical(normal, torch.randn(16, 1), tuning(0.4, 1.5))
    draws, stats = draw(sampler, 600)
    assert draws.shape == (16, 600, 1)
    assert np.abs(z_scores(draws.square(), torch.ones(1))).max() < 4
    assert stats["lp"].shape == (16, 600)


def test_sample_statistics_have_the_names_of_arviz() -> None:
    x, y = data()
    posterior = MCLMC(**SHORT).fit(linear, x, y, seed=0)
    stats = posterior.sample_stats
    assert posterior.draws.shape == (2, 10, 2)
    assert set(stats) == {"diverging", "lp", "energy_change", "step_size", "n_steps"}
    assert {tuple(v.shape) for v in stats.values()} == {(2, 10)}
    assert stats["diverging"].dtype == torch.bool
    assert stats["n_steps"].unique().tolist() == [2]
    expected = torch.stack([torch.stack([posterior.target.log_density(t) for t in chain]) for chain in posterior.draws])
    torch.testing.assert_close(stats["lp"], expected, rtol=0, atol=1e-9)
    assert posterior.info.gradients == 2 + 2 * 2 * 80
    assert set(posterior.info.extra) >= {"step_size", "decoherence_length", "energy_variance"}


def test_a_given_step_and_length_are_kept() -> None:
    x, y = data()
    posterior = MCLMC(**SHORT, step_size=0.05, decoherence_length=0.7).fit(linear, x, y, seed=0)
    assert posterior.info.extra["step_size"] == [0.05, 0.05]
    assert posterior.info.extra["decoherence_length"] == [0.7, 0.7]


def test_a_given_length_leaves_its_part_of_the_warm_up_to_the_others() -> None:
    assert MCLMC(warmup_steps=90).tuning(4).steps == (30, 30, 0, 30)
    assert MCLMC(warmup_steps=90, decoherence_length=1.0).tuning(4).steps == (90, 0, 0, 0)
    assert MCLMC(warmup_steps=100, precondition=True).tuning(4).steps == (30, 30, 10, 30)
    assert MCLMC(warmup_steps=90, decoherence_length=1.0, step_size=0.1).tuning(4).steps == (0, 0, 0, 90)


def test_energy_errors_far_above_the_goal_warn_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(self: Microcanonical) -> dict[str, object]:
        return {"step_size": [1.0], "decoherence_length": [1.0], "energy_variance": [0.5]}

    monkeypatch.setattr(Microcanonical, "report", report)
    x, y = data()
    with pytest.warns(ConvergenceWarning, match="mean square of 0.5 per parameter, where 0.0005 was aimed at"):
        MCLMC(**SHORT).fit(linear, x, y, seed=0)


def test_an_interrupt_returns_the_draws_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    settings = {**SHORT, "num_samples": 100, "step_size": 0.1, "decoherence_length": 1.0}
    whole = MCLMC(**settings).fit(linear, x, y, seed=0)
    interrupt_after(monkeypatch, 2 * 60 + 2 * 2 * 7)
    with pytest.warns(ConvergenceWarning, match="an interrupt ended the run after 7 of 50 draws a chain"):
        posterior = MCLMC(**settings).fit(linear, x, y, seed=0)
    torch.testing.assert_close(posterior.draws, whole.draws[:, :7], rtol=0, atol=0)


def test_an_interrupt_during_warmup_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    interrupt_after(monkeypatch, 2 * 20)
    with pytest.raises(KeyboardInterrupt, match=r"20 of 60 warm-up iterations"):
        MCLMC(**SHORT).fit(linear, x, y, seed=0)


def test_a_time_limit_returns_the_draws_so_far() -> None:
    x, y = data()
    backend = MCLMC(num_samples=10**6, warmup_steps=0, step_size=0.1, decoherence_length=1.0, max_seconds=0.5)
    with pytest.warns(ConvergenceWarning, match="max_seconds=0.5 ended the run"):
        posterior = backend.fit(linear, x, y, seed=0)
    assert 1 <= posterior.draws.shape[1] < 10**5


def test_a_time_limit_during_warmup_says_how_far_it_came() -> None:
    x, y = data()
    with pytest.raises(TimeoutError, match=r"max_seconds=0.05 .* of 1000000 warm-up iterations"):
        MCLMC(num_samples=40, warmup_steps=10**6, max_seconds=0.05).fit(linear, x, y, seed=0)


@pytest.mark.filterwarnings("ignore:the energy errors")
def test_a_checkpoint_goes_on_to_the_same_draws(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    settings = {**SHORT, "num_samples": 60, "checkpoint_every": 5}
    whole = MCLMC(**settings).fit(linear, x, y, seed=0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 * 60 + 2 * 2 * 13)
        with pytest.warns(ConvergenceWarning, match="after 13 of 30 draws a chain; the same fit goes on from"):
            MCLMC(**settings, checkpoint=tmp_path).fit(linear, x, y, seed=0)
    resumed = MCLMC(**settings, checkpoint=tmp_path).fit(linear, x, y, seed=0)
    torch.testing.assert_close(resumed.draws, whole.draws, rtol=0, atol=0)
    assert all(torch.equal(resumed.sample_stats[k], v) for k, v in whole.sample_stats.items())
    assert resumed.info.gradients == whole.info.gradients


def test_chains_start_where_init_says() -> None:
    x, y = data()
    starts = torch.tensor([[5.0, 5.0], [-5.0, 5.0]])
    backend = MCLMC(
        num_samples=4, warmup_steps=0, num_chains=2, thinning=1, step_size=1e-6, decoherence_length=1.0, compile=False
    )
    torch.testing.assert_close(backend.fit(linear, x, y, init=starts).draws[:, 0], starts, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": 0}, "`warmup_steps` must be >= 1 where something is tuned, got 0"),
        ({"warmup_steps": 0, "step_size": 0.1}, "`warmup_steps` must be >= 1 where something is tuned"),
        ({"temperature": 0.0}, "`temperature` must be > 0, got 0.0"),
        ({"step_size": -0.1}, "`step_size` must be > 0, got -0.1"),
        ({"decoherence_length": 0}, "`decoherence_length` must be > 0, got 0"),
        ({"energy_variance": 0.0}, "`energy_variance` must be > 0, got 0.0"),
        ({"window": 0.5}, "`window` must be > 1, got 0.5"),
        ({"num_samples": 5, "thinning": 10}, "`thinning` must be <= `num_samples`"),
    ],
)
def test_bad_fields_are_refused_before_any_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCLMC(**fields)


def test_an_init_of_another_model_is_refused_before_any_sampling() -> None:
    x, y = data()

    def other(x: Tensor, y: Tensor | None = None) -> None:
        import pyro
        import pyro.distributions as dist

        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(bias * x[:, 0], 1.0), obs=y)

    wrong = MAP(num_steps=2, polish=False, compile=False).fit(other, x, y)
    with pytest.raises(ValueError, match="`init` belongs to another model"):
        MCLMC(**SHORT).fit(linear, x, y, init=wrong)


def test_a_start_that_is_not_finite_names_the_chain() -> None:
    x, y = data()
    with pytest.raises(ArithmeticError, match="chain 1, step 0: log density"):
        MCLMC(**SHORT).fit_to(compile_target(linear, x, y), init=torch.tensor([[0.0, 0.0], [1e200, 0.0]]))


def test_the_bar_shows_the_step_size_and_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, float]] = []

    def advance(self: Bar, steps: int = 1, **figures: float) -> None:
        shown.append(figures)

    monkeypatch.setattr(Bar, "advance", advance)
    x, y = data()
    MCLMC(**SHORT).fit(linear, x, y, seed=0)
    assert {"step_size", "length"} <= set(shown[-1])


def test_all_chains_are_one_problem_of_the_noise() -> None:
    one = problem(normal, torch.zeros(2, 3))
    first, second = one.noise.normal(4), one.noise.normal(4)
    assert first.shape == (2, 4)
    assert not torch.isclose(first, second).any()
    uniforms = torch.stack([one.noise.log_uniform() for _ in range(300)])
    assert bool((uniforms <= 0).all())
    assert float(uniforms.exp().mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
def test_compiled_chains_are_the_eager_ones() -> None:
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warm-up far too short
        fits = [MCLMC(**{**SHORT, "precondition": True, "compile": c}).fit(linear, x, y) for c in (True, False)]
    torch.testing.assert_close(fits[0].draws, fits[1].draws, rtol=0, atol=1e-7)
