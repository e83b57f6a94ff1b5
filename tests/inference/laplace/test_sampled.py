"""SampledLaplace as a backend: predictions, minibatches, networks with every kind of layer, memory, and refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bnn_models import MLP, bayesianize, likelihoods, priors
from inference import MAP, ApproximationWarning, ConvergenceWarning, DenseLaplace, SampledLaplace, Subset
from inference.backend import Run
from inference.linearised_draws import LinearisedDrawsPosterior
from tests.cases import CASES
from tests.conjugate import linear_regression
from tests.networks import network
from tests.tolerances import z_limit

QUIET = {"compile": False, "progress": False}
START = MAP(num_steps=100, **QUIET)
CASE = {case.name: case for case in CASES}


def regression(num: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(num, 1, generator=generator) * 4 - 2
    return x, x[:, 0].sin() + 0.1 * torch.randn(num, generator=generator)


def mlp(width: int = 6) -> MLP:
    return MLP([1, width, 1], prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(scale=0.2))


def test_predictions_agree_with_the_dense_posterior_within_monte_carlo_error():
    x, y = regression()
    dense = DenseLaplace(start=START, **QUIET).fit(mlp(), x, y)
    num = 4_000
    sampled = SampledLaplace(num_samples=num, start=None, tolerance=1e-8, **QUIET).fit(mlp(), x, y, init=dense)
    expected, found = dense.predict(x), sampled.predict(x)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-8, atol=1e-8)
    ratio = found.f_variance / expected.f_variance
    assert (ratio - 1).abs().max() < z_limit(len(x)) * (2 / num) ** 0.5
    torch.testing.assert_close(found.aleatoric_variance, expected.aleatoric_variance)


def test_minibatches_agree_with_the_full_data():
    problem = linear_regression()
    batched = SampledLaplace(num_samples=500, batch_size=10, num_steps=2000, start=START, **QUIET)
    posterior = batched.fit(problem.model, problem.x, problem.y, init={"w": problem.mean})
    white = posterior.deviations @ torch.linalg.cholesky(problem.precision)
    error = (2 / 500) ** 0.5
    torch.testing.assert_close(white.T @ white / 500, torch.eye(3), rtol=0, atol=z_limit(9) * error + 0.02)


@pytest.mark.parametrize(
    "name",
    ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("encoder", "grouped", "learnt_noise"))],
)
def test_networks_of_any_layers_are_sampled_as_they_are(name):
    target, theta = network(name)
    with pytest.warns(ApproximationWarning, match="not at a mode"):  # at a random theta
        posterior = SampledLaplace(num_samples=4, start=None, polish_steps=0, **QUIET).fit_to(target, init=theta)
    assert posterior.draws.shape == (1, 8, target.dim)
    assert torch.isfinite(posterior.predict(target.x).mean).all()
    assert posterior.info.extra["relative_residual"] <= 1e-2


def test_the_last_layer_alone_is_a_subset():
    x, y = regression()
    backend = Subset(SampledLaplace(num_samples=2000, tolerance=1e-10, **QUIET), sites="layers.1.*", rest=START)
    posterior = backend.fit(mlp(), x, y)
    assert isinstance(posterior, LinearisedDrawsPosterior)
    exact = Subset(DenseLaplace(**QUIET), sites="layers.1.*", rest=START).fit(mlp(), x, y)
    ratio = posterior.predict(x).f_variance / exact.predict(x).f_variance
    assert (ratio - 1).abs().max() < z_limit(len(x)) * (2 / 2000) ** 0.5


def test_the_prior_that_was_learnt_can_be_declared():
    x, y = regression()
    posterior = SampledLaplace(em_rounds=5, start=START, **QUIET).fit(mlp(), x, y)
    scales = {name: float(scale.mean()) for name, scale in posterior.prior_scales().items()}
    assert set(scales) == {s.name for s in posterior.target.sites}
    again = MLP([1, 6, 1], prior=priors.Normal(scale=scales), likelihood=likelihoods.Normal(scale=0.2))
    found = DenseLaplace(start=START, **QUIET).fit(again, x, y, init=posterior)
    learnt = posterior.info.extra["prior_precision"]
    for name, scale in scales.items():
        assert learnt[name] == pytest.approx(scale**-2)
    before = DenseLaplace(start=START, **QUIET).fit(mlp(), x, y, init=posterior)
    assert found.log_evidence > before.log_evidence


def test_only_named_sites_are_learnt():
    case = CASE["broadcasting"]  # its noise is a latent site with a half-normal prior
    backend = SampledLaplace(em_rounds=3, sites="w", start=START, **QUIET)
    posterior = backend.fit(case.model(), case.x, case.y)
    assert posterior.learnt == ("w",)
    assert list(posterior.info.extra["effective_parameters"]) == ["w"]
    with pytest.raises(ValueError, match="prior of site 'noise' is not a Gaussian"):
        SampledLaplace(em_rounds=3, start=START, **QUIET).fit(case.model(), case.x, case.y)


def test_solvers_that_are_cut_short_are_reported():
    x, y = regression()
    with pytest.warns(ConvergenceWarning, match="relative residual of"):
        SampledLaplace(num_steps=1, start=START, **QUIET).fit(mlp(20), x, y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1"),
        ({"em_rounds": -1}, "`em_rounds` must be an integer >= 0"),
        ({"tolerance": 0.0}, "`tolerance` must be > 0"),
        ({"step_size": 1.5}, "`step_size` must be < 1"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
        ({"groups": "weight"}, "`groups` must be one of 'all', 'site'"),
        ({"em_rounds": 1, "scaling": "g"}, "`scaling` must be one of 'declared', 'g_prior'"),
        ({"start": 3}, "`start` must be a MAP backend or None"),
        ({"scaling": "g_prior"}, "`scaling` is for learning the prior, but `em_rounds` is 0"),
        ({"em_rounds": 1, "sites": ["w", 3]}, "`sites` must be None, or one or more site name patterns, got"),
        ({"sites": "w"}, "`sites` is for learning the prior"),
        ({"learn_noise": True}, "`learn_noise` is for learning the prior"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SampledLaplace(**fields)


def test_noise_that_is_latent_or_no_normal_is_not_learnt_as_a_factor():
    backend = SampledLaplace(em_rounds=2, learn_noise=True, start=START, **QUIET)
    for name, what in (("broadcasting", "a latent scale"), ("categorical", "Categorical")):
        case = CASE[name]
        with pytest.raises(ValueError, match=f"`learn_noise` needs a Normal likelihood with a known scale, got {what}"):
            backend.fit(case.model(), case.x, case.y)


def test_a_prior_is_not_learnt_at_another_temperature():
    x, y = regression()
    with pytest.raises(ValueError, match="leave both temperatures at 1"):
        SampledLaplace(em_rounds=2, likelihood_temperature=2.0, start=START, **QUIET).fit(mlp(), x, y)


def test_a_prior_without_curvature_is_refused_by_name():
    def flat(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Laplace(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    x = torch.randn(10, 2)
    with pytest.raises(ValueError, match="in site 'w': neither data nor prior bend the density"):
        SampledLaplace(start=START, **QUIET).fit(flat, x, x[:, 0])


class ResNet(nn.Module):
    """Two stages of residual blocks with batch norm, 1,700 to 27,000 parameters by width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.last = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        hidden = torch.relu(hidden + self.inner(hidden))
        return self.last(torch.relu(self.down(hidden)).mean((2, 3)))


def images(num: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num) % 10
    colours = 2 * torch.randn(10, 3, 1, 1, generator=generator)
    return (colours[y] + torch.randn(num, 3, 12, 12, generator=generator)).float(), y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:not at a mode:inference.errors.ApproximationWarning")
@pytest.mark.parametrize("batch_size", [None, 50])
def test_a_residual_network_in_eval_mode_gets_error_bars(batch_size):
    torch.manual_seed(0)
    x, y = images(200)
    torch.set_default_dtype(torch.float32)
    net = ResNet(8)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    model = bayesianize(net.eval(), prior=priors.Normal(scale=0.05), likelihood=likelihoods.Categorical())
    backend = SampledLaplace(num_samples=8, start=None, polish_steps=0, num_steps=60, batch_size=batch_size, **QUIET)
    posterior = backend.fit(model, x, y)
    seen = posterior.predict(x)
    unseen = posterior.predict(3 * torch.randn(200, 3, 1, 1, generator=torch.Generator().manual_seed(1)) + 0 * x)
    assert (seen.labels == y).double().mean() > 0.9
    assert unseen.mutual_information.mean() > seen.mutual_information.mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::inference.errors.ApproximationWarning")
@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
def test_memory_grows_as_draws_times_parameters():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 200, generator=generator).float()
    y = torch.arange(64) % 4
    torch.set_default_dtype(torch.float32)
    peaks = {}
    for width, num in ((400, 8), (400, 32), (800, 32)):
        model = MLP([200, width, width, 4], prior=priors.Normal(scale="fan_in"), likelihood=likelihoods.Categorical())
        theta = MAP(num_steps=20, polish=False, **QUIET).fit(model, x, y)
        backend = SampledLaplace(num_samples=num, start=None, polish_steps=0, num_steps=20, tolerance=1e-6, **QUIET)
        posterior = backend.fit(model, x, y, init=theta)
        size = 4 * num * posterior.target.dim  # k P floats
        peaks[width, num] = (posterior.info.peak_bytes, size)
    # A few sets of k vectors, and what does not depend on k; P x P would be 10,000 times as much.
    for peak, size in peaks.values():
        assert peak < 14 * size + 300e6
    (small, small_size), (large, large_size) = peaks[400, 8], peaks[800, 32]
    assert (large - small) / (large_size - small_size) < 14


def test_a_prior_that_couples_weights_is_said_to_lose_it():
    def coupled(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(ApproximationWarning, match="the prior couples entries of theta"):
        SampledLaplace(num_samples=2, start=START, **QUIET).fit(coupled, x, x.sum(-1))


def test_draws_that_spread_farther_than_the_prior_are_no_posterior():
    target, theta = network("by_hand")
    precision, backend = torch.linspace(0.5, 2.0, target.dim), SampledLaplace()
    noise = torch.randn(16, target.dim, generator=torch.Generator().manual_seed(0))

    def posterior(scale: float) -> LinearisedDrawsPosterior:
        draws = scale * noise * precision.rsqrt()
        return LinearisedDrawsPosterior(target, theta, draws, backend=backend, prior_precision=precision)

    run = Run(backend, target, 0)
    backend._check_spread(posterior(1.0), run)
    assert abs(run.info.extra["determined_parameters"]) < 5 * (2 * target.dim / 16) ** 0.5
    with pytest.warns(ConvergenceWarning, match=r"farther than the prior allows: -\d+"):
        backend._check_spread(posterior(1.5), run)


def test_the_parameters_that_draws_determine_are_those_of_the_dense_posterior():
    x, y = regression()
    dense = DenseLaplace(start=START, **QUIET).fit(mlp(), x, y)
    sampled = SampledLaplace(num_samples=2_000, start=None, tolerance=1e-8, **QUIET).fit(mlp(), x, y, init=dense)
    found, error = sampled.determined_parameters()
    expected = len(sampled.center) - (dense.gaussian.covariance().diagonal() * sampled.prior_precision).sum()
    assert 0 < expected < len(sampled.center)
    assert abs(found - expected) < 4 * error
