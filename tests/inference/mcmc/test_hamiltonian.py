import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import graph
from inference.backend import Bar
from inference.errors import ConvergenceWarning, DivergenceWarning, NonFiniteError
from inference.mcmc import HMC, MCLMC, NUTS, ChEESHMC
from inference.mcmc.chain_backend import ChainBackend
from inference.mcmc.hamiltonian import HamiltonianBackend, precise_log_density
from inference.target import compile_target
from tests.inference.mcmc.sampling import z_scores

BACKENDS = pytest.mark.parametrize("backend", [NUTS, HMC])
NOISE = 0.5


def linear(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight, NOISE), obs=y)


def data(num: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -0.5]) + NOISE * torch.randn(num, generator=generator)


def conjugate(x: Tensor, y: Tensor, likelihood_temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    variance = NOISE**2 * likelihood_temperature
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / variance)
    return covariance @ (x.T @ y) / variance, covariance


@BACKENDS
@pytest.mark.parametrize(("temperature", "likelihood_temperature"), [(1.0, 1.0), (0.25, 1.0), (4.0, 1.0), (1.0, 3.0)])
def test_posterior_is_the_conjugate_one_at_every_temperature(
    backend: type, temperature: float, likelihood_temperature: float
) -> None:
    x, y = data()
    fit = backend(
        num_samples=150,
        warmup_steps=100,
        num_chains=8,
        temperature=temperature,
        likelihood_temperature=likelihood_temperature,
    )
    draws = fit.fit(linear, x, y, seed=3).draws
    mean, covariance = conjugate(x, y, likelihood_temperature)
    assert draws.shape == (8, 150, 2)
    assert np.abs(z_scores(draws, mean)).max() < 4
    assert np.abs(z_scores((draws - mean).square(), temperature * covariance.diagonal())).max() < 4
    assert abs(z_scores((draws - mean).prod(-1), temperature * covariance[0, 1])) < 4


@BACKENDS
def test_constrained_site_has_the_jacobian(backend: type) -> None:
    # Trap of section 0.2: Gamma(3, 1) has mean 3 in its own space.
    def model(x: Tensor, y: Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(0.0 * rate * x, 1.0), obs=y)

    posterior = backend(num_samples=150, warmup_steps=100, num_chains=8, target_accept=0.95).fit(
        model, torch.zeros(1), torch.zeros(1)
    )
    rate = posterior.draws[..., 0].exp()
    assert abs(z_scores(rate, torch.tensor(3.0))) < 4


@BACKENDS
def test_sample_statistics_have_the_names_of_arviz(backend: type) -> None:
    x, y = data()
    posterior = backend(num_samples=20, warmup_steps=100, num_chains=3).fit(linear, x, y, seed=0)
    stats = posterior.sample_stats
    assert set(stats) == {"diverging", "tree_depth", "n_steps", "acceptance_rate", "energy", "lp", "step_size"}
    assert {tuple(v.shape) for v in stats.values()} == {(3, 20)}
    expected = torch.stack([torch.stack([posterior.target.log_density(t) for t in chain]) for chain in posterior.draws])
    torch.testing.assert_close(stats["lp"], expected, rtol=0, atol=1e-9)
    assert bool((stats["energy"] >= -stats["lp"]).all())
    assert float(stats["acceptance_rate"].min()) >= 0
    assert float(stats["acceptance_rate"].max()) <= 1
    assert len(torch.unique(stats["step_size"])) == 3
    assert posterior.info.gradients > stats["n_steps"].sum()


def test_the_same_seed_gives_the_same_draws_whatever_the_number_of_chains() -> None:
    x, y = data()
    few, many = (NUTS(num_samples=10, warmup_steps=50, num_chains=c).fit(linear, x, y, seed=1) for c in (2, 4))
    torch.testing.assert_close(few.draws, many.draws[:2], rtol=1e-6, atol=1e-6)
    again = NUTS(num_samples=10, warmup_steps=50, num_chains=2).fit(linear, x, y, seed=1)
    torch.testing.assert_close(again.draws, few.draws, rtol=0, atol=0)
    other = NUTS(num_samples=10, warmup_steps=50, num_chains=2).fit(linear, x, y, seed=2)
    assert not torch.isclose(other.draws, few.draws).any()


@pytest.mark.parametrize("backend", [NUTS, HMC, MCLMC, ChEESHMC])
def test_too_few_draws_to_compare_are_refused(backend: type[ChainBackend]) -> None:
    with pytest.raises(ValueError, match=r"`num_samples`=1 and `thinning`=1 keep 1 draw\(s\) .* at least 4"):
        backend(num_samples=1, thinning=1, num_chains=4)
    with pytest.raises(ValueError, match=r"keep 3 draw\(s\) of each chain"):
        backend(num_samples=30, thinning=10, num_chains=4)
    assert backend(num_samples=1, thinning=1, num_chains=16).num_samples == 1  # groups of chains are compared


@pytest.mark.parametrize("backend", [NUTS, HMC])
def test_no_warmup_without_a_step_size_is_refused(backend: type[HamiltonianBackend]) -> None:
    with pytest.raises(ValueError, match="`warmup_steps` must be >= 1 where the step size is adapted, got 0"):
        backend(warmup_steps=0)


def test_a_single_chain_warns_before_it_samples_and_is_not_trusted() -> None:
    x, y = data()
    backend = NUTS(num_samples=100, warmup_steps=50, num_chains=1, allow_one_chain=True, compile=False)
    with pytest.warns(ConvergenceWarning, match="one chain cannot show whether it has mixed"):
        posterior = backend.fit(linear, x, y, seed=0)
    found = posterior.diagnose()
    assert sum("one chain" in text for text in found.warnings) == 1
    assert not found.trusted


def test_chains_start_where_init_says() -> None:
    x, y = data()
    starts = torch.tensor([[5.0, 5.0], [-5.0, 5.0]])
    posterior = HMC(
        num_samples=4, warmup_steps=0, num_chains=2, step_size=1e-6, adapt_step_size=False, num_leapfrogs=1
    ).fit(linear, x, y, init=starts)
    torch.testing.assert_close(posterior.draws[:, 0], starts, rtol=0, atol=1e-3)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    seen = 0

    def advance(self: Bar, steps: int = 1, **figures: float) -> None:
        nonlocal seen
        seen += steps
        if seen == num:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "advance", advance)


def test_an_interrupt_returns_the_draws_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    interrupt_after(monkeypatch, 120)
    with pytest.warns(ConvergenceWarning, match=r"an interrupt ended the run after \d+ of 500 draws"):
        posterior = NUTS(num_samples=500, warmup_steps=10, num_chains=2).fit(linear, x, y, seed=0)
    assert 1 <= posterior.draws.shape[1] < 110
    assert bool(torch.isfinite(posterior.draws).all())
    assert posterior.sample_stats["lp"].shape == posterior.draws.shape[:2]
    assert posterior.info.warnings[0][0] == "ConvergenceWarning"


def test_an_interrupt_during_warmup_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    interrupt_after(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt, match="of 100 warm-up iterations"):
        NUTS(num_samples=500, warmup_steps=100, num_chains=2).fit(linear, x, y, seed=0)


def test_a_time_limit_returns_the_draws_so_far() -> None:
    x, y = data()
    with pytest.warns(ConvergenceWarning, match="max_seconds=0.3 ended the run"):
        posterior = HMC(num_samples=10**5, warmup_steps=0, num_chains=2, step_size=0.1, max_seconds=0.3).fit(
            linear, x, y, seed=0
        )
    assert 1 <= posterior.draws.shape[1] < 10**5


def test_a_time_limit_during_warmup_says_how_far_it_came() -> None:
    x, y = data()
    with pytest.raises(TimeoutError, match=r"max_seconds=0.05 .* of 100000 warm-up iterations"):
        NUTS(num_samples=5, warmup_steps=10**5, num_chains=2, max_seconds=0.05).fit(linear, x, y, seed=0)


def test_divergences_warn_with_their_number() -> None:
    def funnel(x: Tensor, y: Tensor | None = None) -> None:
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(9), (0.5 * log_scale).exp()).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(0.0 * z.sum() * x, 1.0), obs=y)

    backend = NUTS(
        num_samples=50, warmup_steps=10, num_chains=4, step_size=1.0, adapt_step_size=False, mass_matrix="identity"
    )
    with pytest.warns(DivergenceWarning) as caught:
        posterior = backend.fit(funnel, torch.zeros(1), torch.zeros(1), seed=0)
    number = int(posterior.sample_stats["diverging"].sum())
    assert number > 0
    assert any(f"{number} of 200 draws diverged" in str(w.message) for w in caught)
    assert ("DivergenceWarning", str(caught[0].message)) in posterior.info.warnings


def test_trees_that_never_turn_warn_with_their_share() -> None:
    x, y = data()
    backend = NUTS(
        num_samples=20, warmup_steps=0, num_chains=2, max_tree_depth=2, step_size=1e-4, adapt_step_size=False
    )
    with pytest.warns(ConvergenceWarning, match=r"100 % of the trajectories reached max_tree_depth=2"):
        backend.fit(linear, x, y, seed=0)


def test_a_start_that_is_not_finite_names_the_observed_site() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample(
                "target", dist.Normal(torch.where(x > 2, weight / 0.0, weight), 1.0, validate_args=False), obs=y
            )

    with pytest.raises(
        NonFiniteError, match=r"likelihood of site 'target' is not finite at 1 data, the first at row 3"
    ):
        NUTS(num_samples=4, warmup_steps=2).fit(model, torch.arange(4.0), torch.zeros(4))


def test_energies_are_summed_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 2, generator=generator).float()
    y = (1e3 * torch.randn(5000, generator=generator)).float()
    target = compile_target(linear_float32, x, y)
    log_density, tensors = precise_log_density(target)
    theta = torch.tensor([0.1, 0.2])
    got = log_density(theta.float(), *tensors)
    assert got.dtype == torch.float64
    exact = compile_target(linear, x.double(), y.double()).log_density(theta.float().double())
    assert abs(float(got - exact)) / abs(float(exact)) < 1e-8
    assert target.tempered(2.0, 3.0).log_density(theta.float()) == pytest.approx(
        float(precise_log_density(target.tempered(2.0, 3.0))[0](theta.float(), *tensors)), rel=1e-5
    )


def linear_float32(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight, NOISE), obs=y)


@BACKENDS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("num_chains", 0),
        ("warmup_steps", -1),
        ("step_size", -0.1),
        ("step_size", math.nan),
        ("target_accept", 1.0),
        ("target_accept", 0.0),
        ("mass_matrix", "full"),
        ("max_seconds", 0.0),
        ("temperature", 0.0),
    ],
)
def test_bad_fields_are_named(backend: type, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        backend(**{field: value})


@pytest.mark.parametrize(
    ("backend", "field", "value"),
    [
        (NUTS, "max_tree_depth", 0),
        (NUTS, "max_tree_depth", 21),
        (HMC, "trajectory_length", 0.0),
        (HMC, "num_leapfrogs", 0),
        (HMC, "jitter", 1.0),
        (HMC, "max_leapfrogs", 0),
    ],
)
def test_bad_fields_of_one_sampler_are_named(backend: type, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        backend(**{field: value})


def test_a_dense_mass_that_does_not_fit_is_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(30_000), 1.0).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(weight.sum() * x, 1.0), obs=y)

    with pytest.raises(ValueError, match="needs about 80 GiB for 30000 parameters"):
        NUTS(mass_matrix="dense").fit(model, torch.zeros(1), torch.zeros(1))


@BACKENDS
def test_repr_recreates_the_backend(backend: type) -> None:
    made = backend(num_samples=7, step_size=0.1, mass_matrix="dense")
    assert eval(repr(made), {"NUTS": NUTS, "HMC": HMC}) == made


def network(x: Tensor, y: Tensor | None = None) -> None:
    hidden = 50
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(1, hidden), 1.0).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(torch.zeros(hidden), 1.0).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(hidden), hidden**-0.5).to_event(1))
    b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1 + b1) @ w2 + b2, 0.2), obs=y)


@pytest.mark.slow
def test_nuts_and_hmc_agree_on_the_predictions_of_a_network() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(15, 1, generator=generator) - 2, torch.rand(15, 1, generator=generator) + 1])
    y = torch.sin(3 * x[:, 0]) + 0.2 * torch.randn(30, generator=generator)
    grid = torch.linspace(-3, 3, 100)[:, None]
    moments = []
    for backend in (
        NUTS(num_samples=150, warmup_steps=150, num_chains=4),
        HMC(num_samples=150, warmup_steps=150, num_chains=4, num_leapfrogs=150),
    ):
        draws = backend.fit(network, x, y, seed=0).draws
        w1, b1, w2, b2 = draws[..., :50], draws[..., 50:100], draws[..., 100:150], draws[..., 150:]
        f = (torch.tanh(grid * w1[..., None, :] + b1[..., None, :]) * w2[..., None, :]).sum(-1) + b2  # (C, S, 100)
        for values in (f, f.square()):
            mean = values.mean((0, 1))
            moments.append((mean.numpy(), mean.numpy() / z_scores(values, torch.zeros(100))))
    for (a, error_a), (b, error_b) in ((moments[0], moments[2]), (moments[1], moments[3])):
        assert np.abs((a - b) / np.sqrt(error_a**2 + error_b**2)).max() < 4


def test_a_second_fit_to_a_target_records_no_second_leapfrog(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, original = [], graph.capture

    def capture(fn: Any, *example: Any, **options: Any) -> graph.Captured:
        recorded.append(fn)
        return original(fn, *example, **options)

    monkeypatch.setattr(graph, "capture", capture)
    x, generator = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 12, generator=generator)
    sampler = NUTS(num_samples=8, warmup_steps=8, num_chains=2, compile=False, progress=False)
    target = compile_target(linear, x, first)
    sampler.fit_to(target, seed=0)
    num = len(recorded)
    assert num > 0
    found = sampler.fit_to(replace(target, y=second), seed=0)
    assert len(recorded) == num
    assert torch.equal(found.draws, sampler.fit_to(compile_target(linear, x, second), seed=0).draws)
    num = len(recorded)
    replace(sampler, temperature=2.0).fit_to(target, seed=0)
    replace(sampler, num_chains=3).fit_to(target, seed=0)
    assert len(recorded) == num + 2
