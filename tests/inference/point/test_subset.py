from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bnn_models import bayesianize, likelihoods
from inference.averaging import SWAG
from inference.backend import Backend
from inference.ensembles import DeepEnsemble
from inference.laplace import DenseLaplace, DiagonalLaplace
from inference.mcmc import HMC, NUTS
from inference.particles import SVGD
from inference.point import MAP, Subset
from inference.variational import MeanFieldVI
from tests.tolerances import assert_mean, assert_variance

NOISE = 0.5


def two_parts(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("part.a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("part.b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("other", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, :2] @ a + x[:, 2:] @ b, NOISE), obs=y)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5, 2.0])
    return x, y + NOISE * torch.randn(30, generator=generator)


def everything(x: Tensor, y: Tensor) -> Tensor:
    precision = x.T @ x / NOISE**2 + torch.diag(torch.tensor([1.0, 1.0, 0.25, 0.25]))
    return torch.linalg.solve(precision, x.T @ y / NOISE**2)


def conditional(x: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision of part.b given part.a."""
    precision = x[:, 2:].T @ x[:, 2:] / NOISE**2 + torch.eye(2) / 4
    return torch.linalg.solve(precision, x[:, 2:].T @ (y - x[:, :2] @ a) / NOISE**2), precision


def fit(backend: Backend, **fields: Any) -> Any:
    x, y = data()
    return Subset(backend, **{"sites": "part.b", "rest": MAP(num_steps=100), **fields}).fit(two_parts, x, y)


BACKENDS = [
    MAP(num_steps=50),
    MeanFieldVI(num_steps=300, num_particles=4, step_size=0.03),
    HMC(num_samples=300, warmup_steps=150),
    NUTS(num_samples=300, warmup_steps=150),
    DenseLaplace(),
    DiagonalLaplace(),
    SWAG(),
    DeepEnsemble(num_members=3, num_steps=50),
    SVGD(num_particles=10, num_steps=50),
]


@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_every_backend_runs_on_some_sites_and_leaves_the_rest_at_the_mode(backend: Backend) -> None:
    x, y = data()
    posterior = fit(backend)
    sites = posterior.sample_sites(5)
    assert set(sites) == {"part.a", "part.b", "other"}
    assert sites["part.b"].shape == (5, 2)
    torch.testing.assert_close(sites["part.a"], everything(x, y)[:2].expand(5, 2), rtol=0, atol=1e-4)
    prediction = posterior.predict(x[:7], num_samples=5)
    assert prediction.mean.shape == (7,)
    assert torch.isfinite(prediction.variance).all()
    assert posterior.target.dim == 2


@pytest.mark.parametrize(
    "backend",
    [NUTS(num_samples=400, warmup_steps=200), HMC(num_samples=400, warmup_steps=200)],
    ids=lambda b: type(b).__name__,
)
def test_sampling_gives_the_conditional_posterior(backend: Backend) -> None:
    x, y = data()
    posterior = fit(backend)
    mean, precision = conditional(x, y, posterior.sample_sites(1)["part.a"][0])
    assert_mean(posterior.draws, mean)
    assert_variance(posterior.draws, torch.linalg.inv(precision).diag(), mean)


def test_laplace_gives_the_conditional_posterior_in_closed_form() -> None:
    x, y = data()
    posterior = fit(DenseLaplace())
    mean, precision = conditional(x, y, posterior.sample_sites(1)["part.a"][0])
    torch.testing.assert_close(posterior.mean_theta, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.gaussian.covariance(), torch.linalg.inv(precision), rtol=1e-6, atol=0)


def test_mean_field_gives_one_over_the_diagonal_of_the_conditional_precision() -> None:
    x, y = data()
    posterior = fit(MeanFieldVI(num_steps=800, num_particles=8, step_size=0.02))
    _, precision = conditional(x, y, posterior.sample_sites(1)["part.a"][0])
    torch.testing.assert_close(posterior.gaussian.scale, precision.diag().rsqrt(), rtol=0.04, atol=0)


@pytest.mark.parametrize(
    "backend",
    [DeepEnsemble(num_members=3, num_steps=2), SVGD(num_particles=3, num_steps=2)],
    ids=lambda b: type(b).__name__,
)
def test_members_start_apart(backend: Backend) -> None:
    assert fit(backend).flat_draws.unique(dim=0).shape[0] == 3


def test_the_last_layer_of_a_network_is_its_linear_model() -> None:
    def network(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("layers.0.weight", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        v = pyro.sample("layers.1.weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w) @ v, NOISE), obs=y)

    x, y = data()
    posterior = Subset(DenseLaplace(), sites="layers.1.*", rest=MAP(num_steps=300)).fit(network, x, y)
    features = torch.tanh(x @ posterior.sample_sites(1)["layers.0.weight"][0])
    precision = features.T @ features / NOISE**2 + torch.eye(3)
    mean = torch.linalg.solve(precision, features.T @ y / NOISE**2)
    torch.testing.assert_close(posterior.mean_theta, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.gaussian.covariance(), torch.linalg.inv(precision), rtol=1e-6, atol=1e-9)
    variance = torch.einsum("nk,kl,nl->n", features, torch.linalg.inv(precision), features)
    torch.testing.assert_close(posterior.predict(x).epistemic_variance, variance, rtol=1e-5, atol=0)


def test_the_inner_temperature_acts_and_an_outer_one_is_refused() -> None:
    plain, hot = fit(DenseLaplace()), fit(DenseLaplace(temperature=4.0))
    torch.testing.assert_close(hot.gaussian.covariance(), 4 * plain.gaussian.covariance(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="Subset has no temperature"):
        Subset(DenseLaplace(), sites="part.b", temperature=2.0)


def test_the_temperature_of_the_rest_acts_on_the_rest() -> None:
    x, y = data()
    posterior = fit(DenseLaplace(), rest=MAP(num_steps=200, likelihood_temperature=9.0))
    precision = x.T @ x / NOISE**2 / 9 + torch.diag(torch.tensor([1.0, 1.0, 0.25, 0.25]))
    expected = torch.linalg.solve(precision, x.T @ y / NOISE**2 / 9)[:2]
    torch.testing.assert_close(posterior.sample_sites(1)["part.a"][0], expected, rtol=0, atol=1e-4)


def test_without_a_rest_the_fixed_sites_come_from_init() -> None:
    x, y = data()
    init = {"part.a": torch.tensor([3.0, 4.0]), "part.b": torch.zeros(2), "other": torch.tensor(0.5)}
    backend = Subset(DenseLaplace(), sites="part.b", rest=None)
    posterior = backend.fit(two_parts, x, y, init=init)
    assert torch.equal(posterior.sample_sites(2)["part.a"], torch.tensor([3.0, 4.0]).expand(2, 2))
    mean, _ = conditional(x, y, init["part.a"])
    torch.testing.assert_close(posterior.mean_theta, mean, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes the fixed sites from `init`, but none was given"):
        backend.fit(two_parts, x, y)


def test_without_a_rest_a_trained_network_supplies_the_fixed_sites_itself() -> None:
    x, y = data()
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    model = bayesianize(net, likelihood=likelihoods.Normal(0.5))
    posterior = Subset(DenseLaplace(), sites="2.*", rest=None).fit(model, x, y)
    assert torch.equal(posterior.sample_sites(1)["0.weight"][0], net[0].weight)


def test_several_patterns_choose_their_union() -> None:
    posterior = fit(DenseLaplace(), sites=["other", "*.b"])
    assert [s.name for s in posterior.target.sites] == ["part.b", "other"]


def test_cost_of_both_parts_is_counted() -> None:
    inner = MeanFieldVI(num_steps=10)
    alone = fit(inner, rest=MAP(num_steps=100, polish=False)).info.gradients
    twice = fit(inner, rest=MAP(num_steps=200, polish=False)).info.gradients
    assert twice - alone == 100
    assert alone >= 110


def test_the_repr_re_creates_the_backend_with_both_inside() -> None:
    backend = Subset(NUTS(num_samples=7), sites=["a.*", "b"], rest=MAP(num_steps=3))
    assert eval(repr(backend)) == backend
    posterior = fit(DenseLaplace())
    assert isinstance(posterior.backend, Subset)
    assert "DenseLaplace" in repr(posterior)


def test_an_unknown_pattern_is_refused_before_any_work() -> None:
    class Never(MAP):
        def fit_target(self, target: Any, run: Any) -> Any:
            raise AssertionError("the rest was fitted")

    with pytest.raises(ValueError, match="no site matches 'layers.2.*'; the model has"):
        fit(DenseLaplace(), sites="layers.2.*", rest=Never())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"backend": "nuts", "sites": "a"}, TypeError, "`backend` must be a backend such as NUTS"),
        ({"backend": MAP(), "sites": []}, ValueError, "`sites` must be one or more site name patterns"),
        ({"backend": MAP(), "sites": [3]}, ValueError, "`sites` must be one or more site name patterns"),
        ({"backend": MAP(), "sites": "a", "rest": "map"}, TypeError, "`rest` must be a backend such as MAP"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Subset(**fields)
