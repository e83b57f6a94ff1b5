import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.data import load
from inference.averaging import SWAG
from inference.averaging.swag import SnapshotMoments, averaging_schedule
from inference.distributions import DiagonalGaussian, LowRankGaussian

NOISE = 0.5


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def network(x: Tensor, y: Tensor | None = None) -> None:
    w0 = pyro.sample("w0", dist.Normal(torch.zeros(1, 30), 1.0).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(30), 30**-0.5).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w0 + b0) @ w1, noise), obs=y)


def data(num: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 3, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(num, generator=generator)


def snapshots_of_a_quadratic(num: int) -> SnapshotMoments:
    """SGD on independent quadratics of curvature 2 at step size 0.2 with unit gradient noise."""
    generator = torch.Generator().manual_seed(0)
    theta = 0.25 * torch.randn(num, generator=generator)  # the stationary law, of variance .0625
    moments = SnapshotMoments(num, max_rank=20)
    for step in range(1, 40 * 25 + 1):
        theta = theta - 0.2 * (2 * theta + torch.randn(num, generator=generator))
        if step % 25 == 0:
            moments.update(theta)
    return moments


def test_variance_on_a_quadratic_is_that_of_the_paper_and_not_twice_it() -> None:
    # 20,000 coordinates with a relative standard deviation of about .2 each: standard error .0015
    moments = snapshots_of_a_quadratic(20_000)
    gaussian = moments.gaussian(torch.float64)
    assert isinstance(gaussian, LowRankGaussian)
    assert gaussian.variance.mean().item() / 0.0625 == pytest.approx(0.990, abs=0.008)
    public_code = 2 * gaussian.cov_diag + 2 * gaussian.cov_factor.square().sum(-1)  # scale=1
    assert public_code.mean().item() / 0.0625 == pytest.approx(1.98, abs=0.016)


def test_diagonal_variant_has_the_whole_variance_without_the_half() -> None:
    moments = snapshots_of_a_quadratic(20_000)
    gaussian = moments.gaussian(torch.float64, "diagonal")
    assert isinstance(gaussian, DiagonalGaussian)
    assert gaussian.variance.mean().item() / 0.0625 == pytest.approx(39 / 40, abs=0.008)


def test_two_snapshots_give_the_columns_of_the_running_mean() -> None:
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0])
    moments = SnapshotMoments(2, max_rank=2)
    moments.update(a)
    moments.update(b)
    assert torch.equal(moments.columns[0], torch.zeros(2))
    torch.testing.assert_close(moments.columns[1], (b - a) / 2)
    torch.testing.assert_close(moments.variance, (b - a).square() / 4)
    gaussian = moments.gaussian(torch.float64)
    torch.testing.assert_close(gaussian.loc, (a + b) / 2)
    torch.testing.assert_close(gaussian.variance, (b - a).square() / 8 + (b - a).square() / 8)


def test_running_moments_equal_those_of_all_snapshots_and_the_last_columns_are_kept() -> None:
    snapshots = 100 + torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    moments = SnapshotMoments(4, max_rank=5)
    for s in snapshots:
        moments.update(s)
    torch.testing.assert_close(moments.mean, snapshots.mean(0))
    torch.testing.assert_close(moments.variance, snapshots.square().mean(0) - snapshots.mean(0).square())
    expected = torch.stack([snapshots[i] - snapshots[: i + 1].mean(0) for i in range(7, 12)])
    torch.testing.assert_close(torch.stack(tuple(moments.columns)), expected)


def test_the_actual_number_of_columns_scales_the_factor() -> None:
    snapshots = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    few, many = SnapshotMoments(3, max_rank=4), SnapshotMoments(3, max_rank=50)
    for s in snapshots:
        few.update(s)
        many.update(s)
    torch.testing.assert_close(few.gaussian(torch.float64).covariance(), many.gaussian(torch.float64).covariance())


def test_float32_moments_survive_a_mean_far_above_the_spread() -> None:
    snapshots = (1000 + 1e-2 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))).float()
    moments = SnapshotMoments(3, max_rank=20)
    for s in snapshots:
        moments.update(s)
    expected = snapshots.double().var(0, unbiased=False)
    torch.testing.assert_close(moments.variance, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 1.0), (0.5, 1.0), (0.7, 0.55), (0.9, 0.1), (1.0, 0.1), (2.0, 0.1)]
)
def test_schedule_is_constant_then_linear_then_constant(progress: float, factor: float) -> None:
    assert averaging_schedule(progress, 0.1) == pytest.approx(factor)


@pytest.mark.parametrize("variant", ["low_rank", "diagonal"])
def test_mean_of_a_linear_gaussian_model_is_the_posterior_mean(variant: str) -> None:
    x, y = data()
    posterior = SWAG(num_steps=2000, step_size=0.02, averaging_step_size=0.002, variant=variant).fit(linear, x, y)  # type: ignore[arg-type]
    mean = torch.linalg.solve(x.T @ x + NOISE**2 * torch.eye(3), x.T @ y)
    # the mean of about 500 correlated snapshots strays by a fraction of their spread
    assert ((posterior.mean_theta - mean).abs() < 0.5 * posterior.gaussian.variance.sqrt()).all()
    torch.testing.assert_close(posterior.mean_theta, mean, rtol=0, atol=0.01)


def test_the_spread_is_set_by_the_step_size_and_not_by_the_posterior() -> None:
    x, y = data()
    narrow, wide = (
        SWAG(num_steps=1500, step_size=0.02, averaging_step_size=s).fit(linear, x, y).gaussian.variance.mean()
        for s in (0.001, 0.004)
    )
    assert wide > 3 * narrow


@pytest.mark.parametrize("split", [0, 1])
def test_epistemic_variance_grows_outside_the_data_of_the_gap_toy(split: int) -> None:
    toy = load("gap", split=split, dtype=torch.float64)
    model = MLP(
        [1, 50, 1], prior=priors.Normal(scale="fan_in"), likelihood=likelihoods.Normal(scale=dist.HalfNormal(1.0))
    )
    posterior = SWAG().fit(model, toy.x_train, toy.y_train)
    outside = toy.grid[:, 0].abs() > toy.x_train.abs().max()
    beyond = posterior.predict(toy.grid[outside]).epistemic_variance.mean()
    # In standard deviation 1.30 to 1.45 times, over three splits and two seeds.
    assert beyond > 1.2 * posterior.predict(toy.x_train).epistemic_variance.mean()


def test_snapshots_are_taken_once_an_epoch_after_the_start() -> None:
    x, y = data(60)
    posterior = SWAG(num_steps=100, start=0.4, batch_size=20, max_rank=7).fit(linear, x, y)
    assert posterior.info.extra["snapshots"] == 20
    assert posterior.info.extra["rank"] == 7
    assert posterior.info.gradients == pytest.approx(100 / 3)


def test_at_most_half_of_the_data_go_into_a_step() -> None:
    x, y = data(10)
    posterior = SWAG(num_steps=40, batch_size=100).fit(linear, x, y)
    assert posterior.info.gradients == pytest.approx(20)


def test_too_few_snapshots_are_refused() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="SWAG took 1 snapshots and needs at least 2; raise `num_steps`"):
        SWAG(num_steps=100, snapshot_every=50).fit(linear, x, y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_rank": 1}, "`max_rank` must be an integer >= 2, got 1"),
        ({"start": 1.0}, "`start` must be a share of the steps"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"variant": "full"}, "`variant` must be one of 'low_rank', 'diagonal', got 'full'"),
        ({"temperature": 2.0}, "SWAG has no temperature"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SWAG(**fields)  # type: ignore[arg-type]
