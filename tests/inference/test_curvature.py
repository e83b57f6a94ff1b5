"""Curvature against brute force: loops over data, torch.func.hessian, and closed forms."""

from collections.abc import Callable
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.curvature import (
    empirical_fisher,
    empirical_fisher_diagonal,
    ggn,
    ggn_diagonal,
)
from inference.distributions import DenseGaussian, DiagonalGaussian
from inference.hessians import hessian, hessian_diagonal, prior_precision, prior_precision_diagonal
from inference.jacobians import eta_and_jacobian, linearized_joint, linearized_moments
from inference.target import Target, compile_target

N, D, H = 12, 3, 4
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def _network(x: Tensor, num_outputs: int) -> Tensor:
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([D, H]).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(0.0, 0.5).expand([H]).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(0.0, 2.0).expand([H, num_outputs]).to_event(2))
    return torch.tanh(x @ w1 + b1) @ w2


def learnt_noise(x: Tensor, y: Tensor | None = None) -> None:
    mean = _network(x, 1).squeeze(-1)
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def heteroscedastic(x: Tensor, y: Tensor | None = None) -> None:
    out = _network(x, 2)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(out[..., 0], out[..., 1].exp()), obs=y)


def two_outputs(x: Tensor, y: Tensor | None = None) -> None:
    mean = _network(x, 2)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    logits = _network(x, 3)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def binary(x: Tensor, y: Tensor | None = None) -> None:
    logits = _network(x, 1).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    log_rate = _network(x, 1).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def heavy_tails(x: Tensor, y: Tensor | None = None) -> None:
    mean = _network(x, 1).squeeze(-1)
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(4.0, mean, scale), obs=y)


def _inputs() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def _targets(model: Callable[..., None]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if model is classes:
        return torch.randint(0, 3, (N,), generator=generator)
    if model is binary:
        return torch.randint(0, 2, (N,), generator=generator).double()
    if model is counts:
        return torch.randint(0, 5, (N,), generator=generator).double()
    return torch.randn(*((N, 2) if model is two_outputs else (N,)), generator=generator)


@cache
def _case(model: Callable[..., None]) -> tuple[Target, Tensor]:
    target = compile_target(model, _inputs(), _targets(model))
    theta = 0.5 * torch.randn(target.dim, generator=torch.Generator().manual_seed(3))
    return target, theta


MODELS = [learnt_noise, heteroscedastic, two_outputs, classes, binary, counts, heavy_tails]
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)


def _loop_jacobian(target: Target, theta: Tensor, n: int) -> Tensor:
    """(E, P) of one datum by one autograd call per output."""
    theta = theta.clone().requires_grad_()
    eta = target.eta(theta, target.x)[n]
    return torch.stack([torch.autograd.grad(value, theta, retain_graph=True)[0] for value in eta])


@each_model
def test_ggn_equals_a_loop_over_data(model: Callable[..., None]) -> None:
    target, theta = _case(model)
    fishers = target.family(target.x).fisher(target.parameters(theta, target.x))
    jacobians = [_loop_jacobian(target, theta, n) for n in range(N)]
    expected = sum(j.mT @ fisher @ j for j, fisher in zip(jacobians, fishers, strict=True))
    torch.testing.assert_close(ggn(target, theta), expected, **EXACT)
    torch.testing.assert_close(ggn_diagonal(target, theta), expected.diagonal(), **EXACT)


@pytest.mark.parametrize("model", [learnt_noise, heteroscedastic, heavy_tails], ids=lambda model: model.__name__)
def test_ggn_is_the_mean_over_labels_of_the_empirical_fisher(model: Callable[..., None]) -> None:
    target, theta = _case(model)
    # The Fisher is E[g g^T] under the model's own labels, by quadrature over y for every datum.
    params = target.parameters(theta, target.x)
    likelihood = target.likelihood(theta, target.x)
    offsets = torch.linspace(-1, 1, 40_001).mul(torch.pi / 2 * (1 - 1e-9)).tan()
    grid = params["loc"][:, None] + params["scale"][:, None] * offsets
    n = 5
    density = likelihood.log_prob(grid.mT).exp()[:, n]
    weights = density * params["scale"][n] * (1 + offsets.square()) * (offsets.atan()[1] - offsets.atan()[0])
    x = target.x[n : n + 1].expand(len(offsets), D)
    scores = torch.func.jacfwd(lambda t: target.log_likelihood(t, x, grid[n]))(theta)
    expected = scores.mT @ (weights[:, None] * scores)
    torch.testing.assert_close(ggn(target, theta, x=target.x[n : n + 1]), expected, rtol=1e-5, atol=1e-6)


def test_the_categorical_fisher_is_diag_p_minus_p_p_transposed() -> None:
    target, theta = _case(classes)
    probs = target.parameters(theta, target.x)["logits"].softmax(-1)
    jacobians = torch.func.jacrev(lambda t: target.eta(t, target.x))(theta)
    expected = sum(j.mT @ (p.diag() - torch.outer(p, p)) @ j for j, p in zip(jacobians, probs, strict=True))
    torch.testing.assert_close(ggn(target, theta), expected, **EXACT)


def test_the_fisher_of_a_learnt_log_scale_is_two_per_datum() -> None:
    target, theta = _case(learnt_noise)
    scale = next(site for site in target.sites if site.name == "scale")
    torch.testing.assert_close(ggn_diagonal(target, theta)[scale.start], torch.tensor(2.0 * N), **EXACT)
    matrix = ggn(target, theta)
    assert matrix[scale.start, : scale.start].abs().max() == 0


@each_model
def test_hessian_equals_torch_func_hessian(model: Callable[..., None]) -> None:
    target, theta = _case(model)
    expected = torch.func.hessian(lambda t: -target.log_likelihood(t).sum())(theta)
    torch.testing.assert_close(hessian(target, theta), expected, **EXACT)
    torch.testing.assert_close(hessian_diagonal(target, theta), expected.diagonal(), **EXACT)


@each_model
def test_empirical_fisher_equals_a_loop_over_data(model: Callable[..., None]) -> None:
    target, theta = _case(model)
    expected = torch.zeros(target.dim, target.dim)
    for n in range(N):
        point = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(target.log_likelihood(point)[n], point)
        expected += torch.outer(g, g)
    torch.testing.assert_close(empirical_fisher(target, theta), expected, **EXACT)
    torch.testing.assert_close(empirical_fisher_diagonal(target, theta), expected.diagonal(), **EXACT)


def test_empirical_fisher_of_gaussian_noise_is_the_squared_residuals_over_the_noise_variance_squared() -> None:
    scale = 0.7

    def linear(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    x, y = _inputs(), _targets(linear)
    theta = torch.tensor([0.3, -1.0, 0.5])
    residuals = y - x @ theta
    expected = torch.einsum("n,np,nq->pq", residuals.square(), x, x) / scale**4
    torch.testing.assert_close(empirical_fisher(compile_target(linear, x, y), theta), expected, **EXACT)


def test_ggn_equals_the_exact_hessian_for_linear_models() -> None:
    def logistic(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    target = compile_target(logistic, _inputs(), _targets(classes))
    theta = torch.randn(target.dim)
    torch.testing.assert_close(ggn(target, theta), hessian(target, theta), **EXACT)


@each_model
@pytest.mark.parametrize(
    "curvature", [ggn, ggn_diagonal, hessian, hessian_diagonal, empirical_fisher, empirical_fisher_diagonal]
)
def test_chunking_changes_nothing(model: Callable[..., None], curvature: Callable[..., Tensor]) -> None:
    target, theta = _case(model)
    seen: list[int] = []
    whole = curvature(target, theta)
    torch.testing.assert_close(curvature(target, theta, chunk_bytes=1, advance=seen.append), whole, **EXACT)
    assert sum(seen) == N


def test_more_data_than_one_hessian_batch_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    target, theta = _case(learnt_noise)
    whole = hessian(target, theta)
    monkeypatch.setattr("inference.hessians._HESSIAN_BATCH", 5)
    torch.testing.assert_close(hessian(target, theta), whole, **EXACT)


def test_curvature_of_two_copies_of_the_data_is_twice_as_large() -> None:
    target, theta = _case(learnt_noise)
    x, y = torch.cat([target.x] * 2), torch.cat([target.y] * 2)
    double = compile_target(learnt_noise, x, y)
    for curvature in (ggn, hessian, empirical_fisher):
        torch.testing.assert_close(curvature(double, theta), 2 * curvature(target, theta), **EXACT)
    torch.testing.assert_close(empirical_fisher(target, theta, x=x, y=y), empirical_fisher(double, theta), **EXACT)
    torch.testing.assert_close(hessian(target, theta, x=x, y=y), hessian(double, theta), **EXACT)


def test_more_outputs_than_parameters_are_no_special_case() -> None:
    basis = torch.randn(2, 9)

    def wide(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = torch.sin(x[:, :1] * (w @ basis))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    x = _inputs()
    target, theta = compile_target(wide, x, torch.randn(N, 9)), torch.tensor([0.3, -0.4])
    eta, jacobian = eta_and_jacobian(target, theta, x)
    torch.testing.assert_close(eta, target.eta(theta, x))
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda t: target.eta(t, x))(theta), **EXACT)


def test_dictionary_inputs_give_the_same_curvature() -> None:
    def from_two_inputs(inputs: dict[str, Tensor], y: Tensor | None = None) -> None:
        learnt_noise(torch.cat([inputs["left"], inputs["right"]], -1), y)

    target, theta = _case(learnt_noise)
    split = {"left": target.x[:, :1], "right": target.x[:, 1:]}
    other = compile_target(from_two_inputs, split, target.y)
    for curvature in (ggn, hessian, empirical_fisher):
        torch.testing.assert_close(curvature(other, theta, chunk_bytes=1), curvature(target, theta), **EXACT)


def test_prior_precision_of_independent_priors_is_a_diagonal() -> None:
    target, theta = _case(learnt_noise)
    precision = prior_precision(target, theta)
    # log scale with a half-normal prior: -log p = exp(2 t) / 2 - t, whose second derivative is 2 exp(2 t).
    expected = torch.cat([torch.ones(D * H), torch.full((H,), 4.0), torch.full((H,), 0.25), 2 * (2 * theta[-1:]).exp()])
    torch.testing.assert_close(precision, expected, **EXACT)
    torch.testing.assert_close(prior_precision_diagonal(target, theta), expected, **EXACT)


def test_prior_precision_of_a_hierarchical_prior_is_its_exact_dense_hessian() -> None:
    def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        w = pyro.sample("w", dist.Normal(0.0, tau).expand([D]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    target = compile_target(hierarchical, _inputs(), torch.randn(N))
    theta = torch.tensor([0.2, 1.0, -0.5, 2.0])
    expected = torch.func.hessian(lambda t: -target.log_prior(t))(theta)
    assert torch.linalg.eigvalsh(expected)[0] < 0
    torch.testing.assert_close(prior_precision(target, theta), expected, **EXACT)
    torch.testing.assert_close(prior_precision_diagonal(target, theta), expected.diagonal(), **EXACT)


def test_linearized_moments_are_the_moments_of_the_linear_map() -> None:
    target, theta = _case(heteroscedastic)
    x = torch.randn(7, D)
    covariance = torch.randn(target.dim, target.dim)
    gaussian = DenseGaussian.from_covariance(theta, covariance @ covariance.mT + torch.eye(target.dim))
    jacobian = torch.func.jacrev(lambda t: target.eta(t, x))(theta)
    expected = jacobian @ gaussian.covariance() @ jacobian.mT
    for chunk_bytes in (1, 2**20):
        eta, found = linearized_moments(target, gaussian, theta, x, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(eta, target.eta(theta, x), **EXACT)
        torch.testing.assert_close(found, expected, **EXACT)


def test_the_joint_linearized_covariance_has_the_marginal_ones_on_its_diagonal() -> None:
    target, theta = _case(classes)
    x = torch.randn(5, D)
    gaussian = DiagonalGaussian(theta, torch.rand(target.dim) + 0.1)
    eta, joint = linearized_joint(target, gaussian, theta, x)
    means, marginals = linearized_moments(target, gaussian, theta, x)
    flat = torch.func.jacrev(lambda t: target.eta(t, x))(theta).flatten(0, 1)
    torch.testing.assert_close(eta, means, **EXACT)
    torch.testing.assert_close(torch.einsum("nenf->nef", joint), marginals, **EXACT)
    torch.testing.assert_close(joint.reshape(15, 15), flat @ gaussian.covariance() @ flat.mT, **EXACT)


def test_the_linearized_variance_is_the_gaussian_process_posterior_variance() -> None:
    target, theta = _case(two_outputs)
    noise = 0.7**2
    prior = 1 / prior_precision(target, theta)
    posterior = DenseGaussian.from_precision(theta, ggn(target, theta) + (1 / prior).diag())
    x = torch.randn(4, D)
    train = torch.func.jacrev(lambda t: target.eta(t, target.x))(theta).flatten(0, 1)
    test = torch.func.jacrev(lambda t: target.eta(t, x))(theta).flatten(0, 1)

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left * prior) @ right.mT

    gram = kernel(train, train) + noise * torch.eye(len(train))
    expected = kernel(test, test) - kernel(test, train) @ torch.linalg.solve(gram, kernel(train, test))
    _, joint = linearized_joint(target, posterior, theta, x)
    torch.testing.assert_close(joint.reshape(8, 8), expected, rtol=1e-8, atol=1e-8)


def test_gradients_with_respect_to_the_inputs_flow_through_the_linearized_moments() -> None:
    target, theta = _case(learnt_noise)
    gaussian = DiagonalGaussian(theta, torch.full((target.dim,), 0.3))
    x = torch.randn(2, D, requires_grad=True)

    def variance(inputs: Tensor) -> Tensor:
        return linearized_moments(target, gaussian, theta, inputs)[1][:, 0, 0]

    assert torch.autograd.gradcheck(variance, (x,))
