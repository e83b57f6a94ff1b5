"""Probit and Laplace bridge: their formulas, their published errors and limits, and as predictions of a posterior."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

import inference
from inference import MAP, DeepEnsemble, DenseLaplace, DiagonalLaplace, GaussianPosterior
from inference.distributions import DenseGaussian
from inference.errors import CapabilityError
from inference.links import bridge_log_concentration, centred, normalised, probit_logits
from inference.target import Target, compile_target
from tests.cases import normal
from tests.tolerances import z_limit

N = 9
QUIET: dict[str, Any] = {"compile": False, "progress": False}
CLOSED = ["probit", "laplace_bridge", "laplace_bridge_norm"]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _spread(*shape: int, seed: int = 1) -> Tensor:
    """Random covariances, (..., K, K)."""
    root = _random(*shape, shape[-1], seed=seed)
    return root @ root.mT + 0.1 * torch.eye(shape[-1])


def _expected_sigmoid(mean: Tensor, variance: Tensor) -> Tensor:
    """E[sigmoid(f)] by quadrature over twelve standard deviations."""
    z = torch.linspace(-12, 12, 601)
    weight = torch.exp(-0.5 * z.square())
    values = torch.sigmoid(mean[..., None] + variance.sqrt()[..., None] * z)
    return (values * weight).sum(-1) / weight.sum()


def _two_logits(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Two correlated logits whose difference has this mean and variance."""
    common = torch.full_like(mean, 0.7)
    means = torch.stack([common, common + mean], -1)
    first, shared = 0.4 * variance + 0.5, 0.2 * variance + 0.3
    second = variance - first + 2 * shared
    covariance = torch.stack([torch.stack([first, shared], -1), torch.stack([shared, second], -1)], -2)
    return means, covariance


def _bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """log alpha of logits as they come."""
    mean, covariance = centred(mean, covariance)
    return bridge_log_concentration(mean, covariance.diagonal(dim1=-2, dim2=-1))


def _bridge_norm(mean: Tensor, covariance: Tensor) -> Tensor:
    """log alpha of logits as they come, in the unit of their width."""
    mean, covariance = centred(mean, covariance)
    return bridge_log_concentration(*normalised(mean, covariance.diagonal(dim1=-2, dim2=-1)))


def _probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits of probit of logits as they come."""
    num = mean.shape[-1]
    mean, covariance = centred(mean, covariance)
    return probit_logits(mean, covariance * (1.0 if num == 2 else num / (num - 1)))


FORMULAS = {"probit": _probit, "laplace_bridge": _bridge, "laplace_bridge_norm": _bridge_norm}


# -- formulas ----------------------------------------------------------------------


def _largest_error(mean: Tensor, variance: Tensor) -> float:
    mean, variance = torch.meshgrid(mean, variance, indexing="ij")
    found = probit_logits(*_two_logits(mean, variance)).softmax(-1)[..., 1]
    return float((found - _expected_sigmoid(mean, variance)).abs().max())


def test_probit_has_the_known_error_against_quadrature() -> None:
    coarse = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert _largest_error(torch.linspace(0, 8, 17), coarse) == pytest.approx(0.0148, abs=5e-5)
    # between the points of that grid it is a little larger, at mean 8 and variance 19
    assert _largest_error(torch.linspace(0, 8, 81), torch.linspace(0.1, 32, 80)) == pytest.approx(0.01503, abs=1e-5)


def test_probit_at_mean_one_and_variance_four_has_its_known_value() -> None:
    mean, variance = torch.tensor(1.0), torch.tensor(4.0)
    found = probit_logits(*_two_logits(mean, variance)).softmax(-1)[1]
    assert float(found) == pytest.approx(0.65106, abs=5e-6)
    assert float(_expected_sigmoid(mean, variance)) == pytest.approx(0.64773, abs=5e-6)


def test_probit_of_three_classes_divides_each_logit_by_its_own_deviation() -> None:
    mean, covariance = _random(5, 3), _spread(5, 3)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    expected = torch.softmax(mean / torch.sqrt(1 + torch.pi / 8 * variance), -1)
    torch.testing.assert_close(probit_logits(mean, covariance).softmax(-1), expected)


def test_independent_logits_that_are_alike_have_the_published_formula_whatever_is_added_to_all() -> None:
    mean, expected = _random(5, 4), _random(5, 4) / (1 + torch.pi / 8 * 2.0) ** 0.5
    found = _probit(mean, 2.0 * torch.eye(4) + 0.7)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))


def test_one_variance_for_all_logits_leaves_the_most_probable_class_where_it_was() -> None:
    mean = _random(50, 4)
    covariance = 3.0 * torch.eye(4).expand(50, 4, 4)
    assert torch.equal(probit_logits(mean, covariance).argmax(-1), mean.argmax(-1))


@pytest.mark.parametrize("num", [2, 3, 10])
def test_the_bridge_at_zero_has_its_closed_form(num: int) -> None:
    variance = torch.full((num,), 0.3)
    alpha = bridge_log_concentration(torch.zeros(num), variance).exp()
    torch.testing.assert_close(alpha, torch.full((num,), (1 - 1 / num) / 0.3))
    # Of V = v I, logits of sum 0 have V_kk = v (1 - 1 / K), and so alpha = 1 / v.
    whole = _bridge(torch.zeros(num), 0.3 * torch.eye(num)).exp()
    torch.testing.assert_close(whole, torch.full((num,), 1 / 0.3))


def test_the_bridge_inverts_the_gaussian_that_a_dirichlet_has_in_softmax_coordinates() -> None:
    alpha = torch.tensor([4.0, 7.0, 2.5, 9.0])
    num, inverse = len(alpha), 1 / alpha
    mean = alpha.log() - alpha.log().mean()
    shared = (inverse[:, None] + inverse - inverse.mean()) / num
    covariance = inverse.diag() - shared
    torch.testing.assert_close(covariance.sum(-1), torch.zeros(num))
    torch.testing.assert_close(_bridge(mean, covariance).exp(), alpha)


def test_what_is_added_to_all_logits_changes_nothing() -> None:
    mean, covariance = _random(6, 3), _spread(6, 3)
    shift, along = _random(6, 1, seed=7), _random(6, 3, seed=8)
    # f + 1 s with a random shift s that is correlated with f
    moved = covariance + along.unsqueeze(-1) + along.unsqueeze(-2) + 2.0
    for other in ((mean + shift, covariance), (mean, moved)):
        found, expected = centred(*other), centred(mean, covariance)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
        assert found[0].sum(-1).abs().max() < 1e-12
        assert found[1].sum(-1).abs().max() < 1e-12


def test_as_the_variance_vanishes_probit_is_softmax_and_the_bridge_only_for_two_classes() -> None:
    mean = torch.tensor([2.0, 0.0, -2.0])
    covariance = 1e-12 * torch.eye(3)
    softmax = mean.softmax(-1)
    torch.testing.assert_close(softmax, torch.tensor([0.867, 0.117, 0.016]), rtol=0, atol=5e-4)
    torch.testing.assert_close(probit_logits(mean, covariance).softmax(-1), softmax)
    bridge = _bridge(mean, covariance).softmax(-1)
    torch.testing.assert_close(bridge, torch.tensor([0.808, 0.141, 0.051]), rtol=0, atol=5e-4)
    two = _bridge(mean[:2], covariance[:2, :2]).softmax(-1)
    torch.testing.assert_close(two, mean[:2].softmax(-1))


def test_the_bridges_mean_of_two_classes_does_not_see_the_variance() -> None:
    mean = torch.tensor([1.5, 0.0])
    for size in (0.01, 1.0, 100.0):
        found = _bridge(mean, size * torch.eye(2)).softmax(-1)
        torch.testing.assert_close(found, mean.softmax(-1))


def test_the_normalised_bridge_is_the_published_one_for_logits_that_are_alike() -> None:
    mean, num = _random(5, 4), 4
    covariance = 7.0 * torch.eye(num).expand(5, num, num)
    f = mean - mean.mean(-1, keepdim=True)  # what is published subtracts V 1 (1'f) / (1'V 1), the same here
    variance = covariance - 7.0 / num
    scale = variance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) / (num / 2) ** 0.5
    f, diagonal = f / scale.sqrt(), variance.diagonal(dim1=-2, dim2=-1) / scale
    alpha = (1 - 2 / num + f.exp() / num**2 * (-f).exp().sum(-1, keepdim=True)) / diagonal
    torch.testing.assert_close(_bridge_norm(mean, covariance).exp(), alpha)


def test_normalising_the_bridge_softens_wide_outputs_and_sharpens_narrow_ones() -> None:
    mean = torch.tensor([1.5, 0.0])
    wide, narrow = (_bridge_norm(mean, size * torch.eye(2)).softmax(-1)[0] for size in (32.0, 0.02))
    # c = v / 2 for two logits of variance v, so that sigmoid(m) becomes sigmoid(m sqrt(2 / v)).
    assert float(wide) == pytest.approx(float(torch.tensor(1.5 / 4).sigmoid()), abs=1e-12)
    assert float(narrow) == pytest.approx(float(torch.tensor(15.0).sigmoid()), abs=1e-12)
    exact = _expected_sigmoid(torch.tensor(1.5), torch.tensor(64.0))
    assert abs(float(wide - exact)) < 0.03 < 0.2 < float(mean.softmax(-1)[0] - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_variances_and_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    mean = torch.tensor([[300.0, -300.0, 0.0], [0.1, 0.2, 0.3]], dtype=dtype)
    for covariance in (torch.zeros(2, 3, 3, dtype=dtype), torch.eye(3, dtype=dtype).expand(2, 3, 3)):
        for logits in (probit_logits(mean, covariance), _bridge(mean, covariance), _bridge_norm(mean, covariance)):
            assert torch.isfinite(logits.softmax(-1)).all()
            torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, dtype=dtype))


def test_the_arguments_are_left_as_they_are() -> None:
    mean, covariance = _random(5, 3), _spread(5, 3)
    before = mean.clone(), covariance.clone()
    probit_logits(mean, covariance)
    _bridge_norm(mean, covariance)
    assert torch.equal(mean, before[0])
    assert torch.equal(covariance, before[1])


# -- predictions of a posterior ----------------------------------------------------------------------


def three_classes(x: Tensor, y: Tensor | None = None) -> None:
    w1, w2 = pyro.sample("w1", normal(3, 4)), pyro.sample("w2", normal(4, 3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1) @ w2), obs=y)


def two_classes(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(3, 2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


def one_logit(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def two_labels(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(3, 2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


X = _random(N, 3, seed=3)
MODELS: dict[str, tuple[Any, Tensor]] = {
    "three_classes": (three_classes, torch.arange(N) % 3),
    "two_classes": (two_classes, torch.arange(N) % 2),
    "one_logit": (one_logit, torch.arange(N) % 2.0),
    "two_labels": (two_labels, torch.stack([torch.arange(N) % 2.0, torch.arange(N) // 2 % 2.0], -1)),
}


@functools.cache
def _posterior(name: str, size: float = 0.3) -> tuple[GaussianPosterior, Tensor, Tensor]:
    """A linearised posterior; eta and the dense J S J^T of all inputs, (N, E) and (N, E, E)."""
    model, y = MODELS[name]
    target: Target = compile_target(model, X, y)
    loc = _random(target.dim, seed=5)
    covariance = size * _spread(target.dim, seed=6) / target.dim**0.5
    gaussian = DenseGaussian.from_covariance(loc, covariance)
    posterior = GaussianPosterior(target, gaussian, backend="L()", linearized=True)
    jacobian = jacrev(target.eta)(loc)
    return posterior, target.eta(loc), jacobian @ covariance @ jacobian.mT


@pytest.mark.parametrize("link", CLOSED)
@pytest.mark.parametrize("name", ["three_classes", "two_classes"])
def test_class_probabilities_are_those_of_the_dense_formula(name: str, link: str) -> None:
    posterior, eta, covariance = _posterior(name)
    found = posterior.predict(X, link=link)
    torch.testing.assert_close(found.probs, FORMULAS[link](eta, covariance).softmax(-1))
    torch.testing.assert_close(found.mean, found.probs)
    torch.testing.assert_close(found.f_mean, eta)
    torch.testing.assert_close(found.f_variance, covariance.diagonal(dim1=-2, dim2=-1))
    y = posterior.target.y
    torch.testing.assert_close(found.log_prob(y), found.probs[torch.arange(N), y].log())
    torch.testing.assert_close(found.variance, found.probs * (1 - found.probs))
    assert found.num_components == 1
    assert torch.equal(found.labels, found.probs.argmax(-1))


@pytest.mark.parametrize("name", ["one_logit", "two_labels"])
def test_probit_of_bernoulli_labels_takes_each_logit_with_its_own_variance(name: str) -> None:
    posterior, eta, covariance = _posterior(name)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    expected = torch.sigmoid(eta / torch.sqrt(1 + torch.pi / 8 * variance)).reshape(posterior.target.y.shape)
    found = posterior.predict(X, link="probit")
    torch.testing.assert_close(found.mean, expected)
    torch.testing.assert_close(found.probs[..., 1], expected)
    exact = _expected_sigmoid(eta, variance).reshape(expected.shape)
    assert (found.mean - exact).abs().max() < 0.0149


@pytest.mark.parametrize("name", ["one_logit", "two_labels"])
def test_the_bridge_of_bernoulli_labels_is_a_beta_of_the_two_opposite_half_logits(name: str) -> None:
    posterior, eta, covariance = _posterior(name)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    found = posterior.predict(X, link="laplace_bridge")
    shape = posterior.target.y.shape
    total = (eta.exp() + 2 + (-eta).exp()) / variance  # alpha + beta of alpha = (1 + e^f) / v, beta = (1 + e^-f) / v
    mean = eta.sigmoid()
    torch.testing.assert_close(found.mean, mean.reshape(shape))
    torch.testing.assert_close(found.epistemic_variance, (mean * (1 - mean) / (total + 1)).reshape(shape))
    torch.testing.assert_close(found.aleatoric_variance + found.epistemic_variance, found.variance)


@pytest.mark.parametrize("name", MODELS)
def test_the_bridge_has_the_entropies_and_variances_of_its_dirichlet(name: str) -> None:
    posterior, eta, covariance = _posterior(name)
    found = posterior.predict(X, link="laplace_bridge")
    if posterior.target.family().kind == "bernoulli":
        half = torch.stack([-eta / 2, eta / 2], -1).reshape(*posterior.target.y.shape, 2)
        quarter = covariance.diagonal(dim1=-2, dim2=-1).reshape(posterior.target.y.shape)[..., None] / 4
        alpha = bridge_log_concentration(half, quarter).exp()
    else:
        alpha = _bridge(eta, covariance).exp()
    num = 40_000
    torch.manual_seed(0)
    draws = torch.distributions.Dirichlet(alpha).sample((num,))
    entropies = torch.special.entr(draws).sum(-1)
    z = (entropies.mean(0) - found.aleatoric_entropy) / (entropies.std(0) / num**0.5)
    assert z.abs().max() < z_limit(z.numel())
    assert (found.mutual_information > 0).all()
    torch.testing.assert_close(found.probs, alpha / alpha.sum(-1, keepdim=True))
    exact = torch.distributions.Dirichlet(alpha).variance
    torch.testing.assert_close(found.epistemic_variance, exact[..., 1] if found.mean.dim() < alpha.dim() else exact)


@pytest.mark.parametrize("link", CLOSED)
def test_several_labels_of_several_classes_are_taken_one_by_one(link: str) -> None:
    def two_targets(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3, 6))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=(x @ w).reshape(-1, 2, 3)).to_event(1), obs=y)

    y = torch.stack([torch.arange(N) % 3, torch.arange(N) // 3], -1)
    posterior = DenseLaplace(**QUIET).fit(two_targets, X, y)
    found = posterior.predict(X, link=link)
    assert found.probs.shape == (N, 2, 3)
    covariance = posterior.function_covariance(X).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    formula = FORMULAS[link]
    for label in range(2):
        part = slice(3 * label, 3 * label + 3)
        expected = formula(found.f_mean.reshape(N, 6)[:, part], covariance[:, part, part]).softmax(-1)
        torch.testing.assert_close(found.probs[:, label], expected)
    picked = found.probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.log_prob(y), picked.log().sum(-1))
    assert found.entropy.shape == (N, 2)


@pytest.mark.parametrize("name", MODELS)
def test_monte_carlo_is_the_default_and_probit_is_near_it(name: str) -> None:
    posterior, _, _ = _posterior(name, 0.03)
    plain = posterior.predict(X, num_samples=20_000)
    assert torch.equal(plain.mean, posterior.predict(X, num_samples=20_000, link="monte_carlo").mean)
    assert (posterior.predict(X, link="probit").mean - plain.mean).abs().mean() < 0.03


def test_targets_are_sampled_from_the_links_probabilities() -> None:
    posterior, _, _ = _posterior("three_classes")
    found = posterior.predict(X, link="probit", seed=3)
    draws = found.sample(4000)
    share = torch.nn.functional.one_hot(draws, 3).double().mean(0)
    z = (share - found.probs) / (found.variance / 4000).sqrt()
    assert z.abs().max() < z_limit(z.numel())
    assert torch.equal(draws, posterior.predict(X, link="probit", seed=3).sample(4000))


@pytest.mark.parametrize("link", CLOSED)
@pytest.mark.parametrize("name", MODELS)
def test_closed_forms_have_gradients_with_respect_to_the_inputs(name: str, link: str) -> None:
    posterior, _, _ = _posterior(name)
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: posterior.predict(v, link=link).probs, x)


@pytest.mark.parametrize("link", CLOSED)
def test_chunks_of_inputs_change_nothing(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, _, _ = _posterior("three_classes")
    whole = posterior.predict(X, link=link)
    monkeypatch.setattr("inference.linearised.MAX_ROWS", 4)
    parts = posterior.predict(X, link=link)
    assert len(parts._rows) == 3
    torch.testing.assert_close(parts.probs, whole.probs)
    torch.testing.assert_close(parts.log_prob(posterior.target.y), whole.log_prob(posterior.target.y))


@pytest.mark.parametrize("link", CLOSED)
def test_a_loaded_posterior_has_the_links_of_the_saved_one(link: str, tmp_path: Any) -> None:
    posterior, _, _ = _posterior("three_classes")
    posterior.save(tmp_path)
    loaded = inference.load(tmp_path, three_classes)
    assert torch.equal(loaded.predict(X, link=link).probs, posterior.predict(X, link=link).probs)


# -- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("link", ["probit", "laplace_bridge_norm"])
def test_links_without_a_distribution_of_probabilities_say_so(link: str) -> None:
    found = _posterior("three_classes")[0].predict(X, link=link)
    for name in ("aleatoric_variance", "epistemic_variance", "aleatoric_entropy", "mutual_information"):
        with pytest.raises(CapabilityError, match=f'needs a distribution .*"{link}" gives.*"laplace_bridge"'):
            getattr(found, name)


@pytest.mark.parametrize("link", CLOSED)
def test_a_likelihood_without_classes_is_refused_by_name(link: str) -> None:
    posterior = DenseLaplace(start=None, **QUIET).fit(regression, X, X @ torch.ones(3), init=torch.ones(3))
    with pytest.raises(CapabilityError, match=f'link="{link}" gives class probabilities .* but y is Normal'):
        posterior.predict(X, link=link)


@pytest.mark.filterwarnings("ignore::inference.errors.ApproximationWarning")
@pytest.mark.parametrize(
    "backend",
    [DiagonalLaplace(predictive="sampled", **QUIET), MAP(**QUIET), DeepEnsemble(num_members=2, num_steps=5, **QUIET)],
    ids=lambda b: type(b).__name__,
)
def test_a_posterior_that_is_not_linearised_is_refused_by_name(backend: Any) -> None:
    posterior = backend.fit(two_classes, X, torch.arange(N) % 2)
    with pytest.raises(CapabilityError, match=f'link="probit" is for a network linearised.* {type(backend).__name__}'):
        posterior.predict(X, link="probit")


def test_unknown_links_and_numbers_of_samples_for_closed_forms_are_refused() -> None:
    posterior, _, _ = _posterior("two_classes")
    with pytest.raises(
        ValueError, match='`link` must be one of "monte_carlo", "probit", "laplace_bridge", .*got \'mc\''
    ):
        posterior.predict(X, link="mc")
    with pytest.raises(ValueError, match=r'`num_samples` is for link="monte_carlo": link="probit" draws nothing'):
        posterior.predict(X, link="probit", num_samples=10)
