"""The likelihood taken apart and put together again, and its Fisher information against its definition."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import hessian, vmap

from inference.errors import UnsupportedModelError
from inference.observation import LikelihoodFamily, LowerCholeskyBijection, bijection, family_of, parameter_tensors

B = 4
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FAMILIES: dict[str, tuple[Any, set[str]]] = {
    "normal": (dist.Normal(draw(B), draw(B, seed=1).exp()), {"loc", "scale"}),
    "normal, known scale": (dist.Normal(draw(B), 0.5), {"loc"}),
    "normal, two outputs": (dist.Normal(draw(B, 2), draw(B, 2, seed=1).exp()).to_event(1), {"loc", "scale"}),
    "student_t": (dist.StudentT(5.0, draw(B), draw(B, seed=1).exp()), {"loc", "scale"}),
    "categorical": (dist.Categorical(logits=draw(B, 3)), {"logits"}),
    "categorical, two targets": (dist.Categorical(logits=draw(B, 2, 3)).to_event(1), {"logits"}),
    "bernoulli": (dist.Bernoulli(logits=draw(B)), {"logits"}),
    "bernoulli by probs": (dist.Bernoulli(draw(B).sigmoid()), {"logits"}),
    "poisson": (dist.Poisson(draw(B).exp()), {"rate"}),
}
families = pytest.mark.parametrize("name", FAMILIES)


def taken_apart(name: str) -> tuple[Any, LikelihoodFamily, dict[str, Tensor]]:
    fn, varying = FAMILIES[name]
    return fn, family_of(fn, frozenset(varying)), parameter_tensors(fn)


@families
def test_a_family_rebuilds_its_distribution(name: str) -> None:
    fn, family, params = taken_apart(name)
    again = family.distribution(params)
    assert (again.batch_shape, again.event_shape) == ((B,), fn.event_shape)
    y = fn.sample()
    torch.testing.assert_close(again.log_prob(y), fn.log_prob(y), **EXACT)
    stacked = family.distribution({k: v.expand(3, *v.shape) for k, v in params.items()})
    assert stacked.batch_shape == (3, B)


@families
def test_eta_and_back_is_the_identity(name: str) -> None:
    fn, family, params = taken_apart(name)
    eta = family.to_eta(params)
    assert eta.shape[0] == B
    y = fn.sample()
    back = family.distribution(family.from_eta(eta, params))
    torch.testing.assert_close(back.log_prob(y), fn.log_prob(y), **EXACT)
    stacked = family.from_eta(eta.expand(3, *eta.shape), params)
    assert family.distribution(stacked).batch_shape == (3, B)


@families
def test_fisher_information_is_the_expected_hessian(name: str) -> None:
    fn, family, params = taken_apart(name)
    eta = family.to_eta(params)

    def log_prob(eta_n: Tensor, params_n: dict[str, Tensor], y: Tensor) -> Tensor:
        one = {k: v.unsqueeze(0) for k, v in params_n.items()}
        return family.distribution(family.from_eta(eta_n.unsqueeze(0), one)).log_prob(y.unsqueeze(0)).sum()

    num = 4000
    draws = fn.expand((B,)).sample((num,))
    observed = vmap(lambda y: -vmap(hessian(log_prob))(eta, params, y))(draws)  # (S, B, E, E)
    error = (observed.var(0) / num).sqrt()
    fisher = family.fisher(params)
    assert fisher.shape == (B, eta.shape[1], eta.shape[1])
    assert ((observed.mean(0) - fisher).abs() <= 5.0 * error + 1e-8).all()


@families
def test_roots_multiply_to_the_fisher_information(name: str) -> None:
    _, family, params = taken_apart(name)
    fisher, root = family.fisher(params), family.fisher_root(params)
    torch.testing.assert_close(root @ root.mT, fisher, **EXACT)
    labels = fisher.shape[1] // params["logits"].shape[-1] if family.kind == "categorical" else 0
    assert root.shape == (B, fisher.shape[1], fisher.shape[1] - labels)  # logits have a direction without information


def test_roots_of_near_certain_classes_keep_their_digits() -> None:
    logits = torch.tensor([[0.0, 30.0, -3.0], [0.0, -200.0, -200.0], [-200.0, -200.0, 0.0], [-90.0, 0.0, -300.0]])
    family = family_of(dist.Categorical(logits=logits), frozenset({"logits"}))
    probs = logits.double().softmax(-1)
    between = (probs.unsqueeze(-1) * probs.unsqueeze(-2)) * (1 - torch.eye(3))
    exact = torch.diag_embed(between.sum(-1)) - between  # p - p p^T would lose them
    root = family.fisher_root({"logits": logits.float()})
    torch.testing.assert_close((root @ root.mT).double(), exact, rtol=1e-4, atol=1e-37)


def test_unknown_and_latent_df_families_say_what_to_use_instead() -> None:
    gamma = dist.Gamma(draw(B).exp(), 1.0)
    with pytest.raises(UnsupportedModelError, match="not Gamma; use a sampling backend"):
        family_of(gamma, frozenset({"concentration"})).to_eta(parameter_tensors(gamma))
    t = dist.StudentT(draw(B).exp(), 0.0, 1.0)
    with pytest.raises(UnsupportedModelError, match="a latent df"):
        family_of(t, frozenset({"df"})).to_eta(parameter_tensors(t))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(B, 2)), dist.Normal(draw(B, 2), 1.0))
    with pytest.raises(UnsupportedModelError, match="MixtureSameFamily cannot be rebuilt"):
        parameter_tensors(mixture)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Gamma(2.0, draw(B).exp()),
        dist.Beta(2.0, draw(B).exp()),
        dist.LogNormal(draw(B), 0.5),
        dist.Laplace(draw(B), 0.5),
        dist.NegativeBinomial(5.0, logits=draw(B)),
        dist.MultivariateNormal(draw(B, 2), torch.eye(2, dtype=torch.float64).expand(B, 2, 2)),
        dist.OneHotCategorical(logits=draw(B, 3)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_other_distributions_are_rebuilt_as_well(fn: Any) -> None:
    family = family_of(fn, frozenset())
    y = fn.sample()
    assert family.kind == "other"
    torch.testing.assert_close(family.distribution(parameter_tensors(fn)).log_prob(y), fn.log_prob(y), **EXACT)


def test_lower_cholesky_bijection_is_one() -> None:
    transform = bijection(dist.constraints.lower_cholesky)
    assert isinstance(transform, LowerCholeskyBijection)
    theta = draw(5, 6)
    factor = transform(theta)
    assert factor.shape == (5, 3, 3)
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(transform.inv(factor), theta, **EXACT)
    assert transform.forward_shape((5, 6)) == (5, 3, 3)
    assert transform.inverse_shape((5, 3, 3)) == (5, 6)
