import math

import pytest
import torch

from inference.mcmc.adaptation import DualAveraging, stan_windows
from inference.mcmc.metrics import CovarianceEstimator, Metric
from tests.inference.mcmc.sampling import HMC, NUTS, CorrelatedGaussian, ensemble, transitions


@pytest.mark.parametrize(
    ("warmup_steps", "start", "ends"),
    [
        (1000, 75, (100, 150, 250, 450, 950)),
        (500, 75, (100, 150, 250, 450)),
        (200, 75, (100, 150)),
        (160, 75, (100, 110)),
        (150, 75, (100,)),
        (100, 15, (90,)),
        (20, 3, (18,)),
        (19, 19, ()),
        (0, 0, ()),
    ],
)
def test_windows_are_those_of_stan(warmup_steps: int, start: int, ends: tuple[int, ...]) -> None:
    windows = stan_windows(warmup_steps)
    assert (windows.start, windows.ends) == (start, ends)
    assert windows.stop <= warmup_steps


@pytest.mark.parametrize("target", [0.651, 0.8, 0.95])
def test_dual_averaging_reaches_its_target(target: float) -> None:
    averaging = DualAveraging(1.0, target)
    step_size = 1.0
    for _ in range(2000):
        step_size = averaging.update(math.exp(-(step_size**2)))
    assert averaging.averaged == pytest.approx(math.sqrt(-math.log(target)), rel=0.04)


def test_dual_averaging_follows_its_formulas() -> None:
    averaging, mean, average = DualAveraging(0.3, 0.8), 0.0, 0.0
    for m, acceptance in enumerate([0.9, 0.1, 0.75, 0.6], start=1):
        mean = (1 - 1 / (m + 10)) * mean + (0.8 - acceptance) / (m + 10)
        log_step = math.log(3.0) - math.sqrt(m) / 0.05 * mean
        average = m**-0.75 * log_step + (1 - m**-0.75) * average
        assert averaging.update(acceptance) == pytest.approx(math.exp(log_step), rel=1e-12)
    assert averaging.averaged == pytest.approx(math.exp(average), rel=1e-12)


def test_dual_averaging_without_updates_keeps_the_first_step_size() -> None:
    assert DualAveraging(0.25, 0.8).averaged == pytest.approx(0.25)


@pytest.mark.parametrize(("kernel", "target"), [(NUTS, 0.8), (HMC, 0.651)], ids=["nuts", "hmc"])
def test_warmup_brings_acceptance_near_its_target(kernel: object, target: float) -> None:
    gaussian = CorrelatedGaussian()
    running = ensemble(
        gaussian.log_density,
        gaussian.sample(8),
        kernel,  # type: ignore[arg-type]
        num_samples=60,
        warmup_steps=200,
        target_accept=target,
        mass_matrix="identity",
    )
    running.run()
    rates = [t.acceptance for r in running.records for t in transitions(r)]
    # The averaged step size is known to err on the small side.
    assert target - 0.07 < sum(rates) / len(rates) < target + 0.15


def test_step_size_heuristic_finds_the_scale_of_the_posterior() -> None:
    for scale in (1e-3, 1.0, 1e3):
        running = ensemble(
            lambda q, scale=scale: -0.5 * (q / scale).square().sum(),
            torch.full((1, 3), scale),
            num_samples=1,
            warmup_steps=0,
            adapt_step_size=False,
        )
        running.run()
        assert 0.1 < running.records[0].stats["step_size"][0] / scale < 4


@pytest.mark.parametrize("dense", [False, True])
def test_covariance_estimate_is_stans_regularised_one(dense: bool) -> None:
    draws = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([1.0, 10.0, 0.1, 3.0])
    )
    estimator = CovarianceEstimator(dense, draws[0])
    for theta in draws:
        estimator.add(theta)
    expected = 30 / 35 * torch.cov(draws.T) + 1e-3 * 5 / 35 * torch.eye(4)
    got = estimator.regularised(torch.float64)
    torch.testing.assert_close(got, expected if dense else expected.diagonal(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "identity"])
def test_momenta_have_the_mass_as_covariance(kind: str) -> None:
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    metric = Metric.identity(kind, torch.zeros(2))  # type: ignore[arg-type]
    mass = torch.eye(2)
    if kind == "dense":
        metric, mass = metric.updated(covariance), torch.linalg.inv(covariance)
    elif kind == "diagonal":
        metric, mass = metric.updated(covariance.diagonal()), torch.diag(1 / covariance.diagonal())
    linear = torch.stack([metric.momentum(e) for e in torch.eye(2)], 1)
    torch.testing.assert_close(linear @ linear.T, mass, rtol=0, atol=1e-12)
    momentum = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(metric.velocity(momentum), torch.linalg.solve(mass, momentum), rtol=0, atol=1e-12)


def test_metric_keeps_its_masses_when_the_estimate_is_unusable() -> None:
    dense, diagonal = Metric.identity("dense", torch.zeros(2)), Metric.identity("diagonal", torch.zeros(2))
    assert dense.updated(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is dense
    assert diagonal.updated(torch.tensor([1.0, float("nan")])) is diagonal
    assert diagonal.updated(torch.tensor([1.0, 0.0])) is diagonal
