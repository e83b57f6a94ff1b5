"""EmpCov is the Gaussian it says it is, and silences directions in which the inputs never vary."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

from bnn_models import MLP, priors
from inference import compile_target


def slot(shape: tuple[int, ...], **changes: Any) -> priors.Slot:
    fields = {"is_bias": False, "dtype": torch.float64, "device": torch.device("cpu")} | changes
    return priors.Slot(name="layers.0.weight", shape=shape, fan_in=shape[-1], **fields)


def inputs(num: int = 200) -> Tensor:
    """Three inputs: the second repeats the first, the third is dead."""
    first = torch.randn(num, generator=torch.Generator().manual_seed(0))
    return torch.stack([first, first, torch.zeros(num)], 1)


def test_log_prob_is_that_of_independent_rows_with_the_stated_covariance() -> None:
    x, value = inputs(), 0.1 * torch.randn(5, 3)
    covariance = 0.5 * x.T @ x / (len(x) - 1) + 0.01 * torch.eye(3)
    rows = torch.distributions.MultivariateNormal(torch.zeros(3), covariance_matrix=covariance)
    actual = priors.EmpCov(x, scale=0.5, floor=0.01).distribution(slot((5, 3))).log_prob(value)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(rows.log_prob(value).sum().item(), rel=1e-9)


def test_density_in_one_dimension_is_normalised() -> None:
    prior = priors.EmpCov(torch.tensor([[1.0], [-1.0]]), scale=0.5, floor=0.2).distribution(slot((1, 1)))
    grid = torch.linspace(-15.0, 15.0, 4001)
    mass = torch.trapezoid(prior.log_prob(grid.reshape(-1, 1, 1)).exp(), grid)
    assert mass.item() == pytest.approx(1.0, abs=1e-10)


def test_draws_have_the_covariance_of_the_inputs_plus_the_floor() -> None:
    x, num = inputs(), 40_000
    pyro.set_rng_seed(0)
    draws = priors.EmpCov(x, scale=0.5, floor=0.01).distribution(slot((num, 3)))()
    expected = 0.5 * x.T @ x / (len(x) - 1) + 0.01 * torch.eye(3)
    found = draws.T @ draws / num
    # Var of a product of two Gaussians: (s_ii s_jj + s_ij^2) / num.
    spread = ((expected.diag()[:, None] * expected.diag() + expected.square()) / num).sqrt()
    assert ((found - expected).abs() < 4.5 * spread).all()


def test_a_dead_input_keeps_only_the_floor() -> None:
    prior = priors.EmpCov(inputs(), floor=0.0025)
    covariance = prior.scale_tril @ prior.scale_tril.T
    assert covariance[2, 2].sqrt().item() == pytest.approx(0.05, rel=1e-9)
    assert covariance[2, :2].abs().max().item() == 0.0
    never_varying = torch.tensor([1.0, -1.0, 0.0]) / math.sqrt(2)
    assert (never_varying @ covariance @ never_varying).item() == pytest.approx(0.0025, rel=1e-9)


def test_fan_in_gives_hidden_units_the_variance_of_the_isotropic_prior() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.tensor([3.0, 1.0, 0.1, 0.0]))
    prior = priors.EmpCov(x, gain=1.5)
    variances = (x @ prior.scale_tril).square().sum(1)
    assert variances.mean().item() == pytest.approx(1.5**2 * x.square().sum(1).mean().item() / 4, rel=1e-9)


def test_centering_makes_a_constant_input_as_dead_as_a_zero_one() -> None:
    x = inputs() + torch.tensor([2.0, 2.0, -3.0])
    covariance = (factor := priors.EmpCov(x, floor=0.0025, center=True).scale_tril) @ factor.T
    assert covariance[2, 2].sqrt().item() == pytest.approx(0.05, rel=1e-9)
    assert (x @ factor).square().sum(1).mean().item() == pytest.approx(x.square().sum(1).mean().item() / 3, rel=1e-9)
    assert priors.EmpCov(x, floor=0.0025).scale_tril[2].norm().item() > 0.2


def test_prior_predictive_of_a_network_follows_the_covariance() -> None:
    x, num = inputs(), 4000
    weights = {"layers.0.weight": priors.EmpCov(x, scale=0.5, floor=0.01), "*": priors.Normal(1.0)}
    model = MLP([3, 6, 1], activation="identity", prior=weights, bias=False)
    pyro.set_rng_seed(0)
    f = Predictive(model, num_samples=num, return_sites=["_RETURN"], parallel=True)(x[:1])["_RETURN"].flatten()
    covariance = 0.5 * x.T @ x / (len(x) - 1) + 0.01 * torch.eye(3)
    expected = 6 * (x[0] @ covariance @ x[0]).item()
    squares = f.square()
    assert abs(squares.mean().item() - expected) < 4 * squares.std().item() / math.sqrt(num)


def test_moving_a_duplicated_input_off_its_copy_does_not_change_predictions_much() -> None:
    x = inputs(40)[:, :2]
    y = torch.tanh(2 * x[:, 0])
    shift = torch.tensor([1.0, -1.0]) / math.sqrt(2)  # a unit step in the direction that never varies
    change = {}
    for name, first in {"emp_cov": priors.EmpCov(x, floor=1e-4), "isotropic": priors.Normal("fan_in")}.items():
        model = MLP([2, 4, 1], prior={"layers.0.weight": first, "*": priors.Normal("fan_in")})
        target = compile_target(model, x, y)
        theta = target.sample_prior(1000, seed=0)
        moved = target.unravel(theta)
        hidden = moved["layers.0.weight"] @ shift
        # The data say nothing about these weights along the shift: there the posterior is the prior.
        moved["layers.0.weight"] = moved["layers.0.weight"] + 3.0 * shift
        before_and_after = [target.log_likelihood(t) for t in (theta[0], target.ravel(moved)[0])]
        torch.testing.assert_close(*before_and_after, rtol=1e-10, atol=1e-10)
        f = [model.network(target.unravel(theta), at) for at in (x, x + shift)]
        change[name] = (hidden.square().mean().sqrt().item(), (f[0] - f[1]).square().mean().sqrt().item())
    # A standard deviation from 4000 draws has a relative error of 1 / sqrt(8000).
    assert change["emp_cov"][0] == pytest.approx(0.01, rel=0.05)
    assert change["isotropic"][0] == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert change["emp_cov"][1] < 0.02 < 0.2 < change["isotropic"][1]


def test_the_model_compiles_to_the_same_density_in_float32() -> None:
    x = inputs(50).float() + 0.1 * torch.randn(50, 3, generator=torch.Generator().manual_seed(2)).float()
    prior = {"layers.0.weight": priors.EmpCov(x, floor=0.01), "*": priors.Normal("fan_in")}
    target = compile_target(MLP([3, 4, 1], prior=prior), x, x[:, 0])
    theta = target.initial(1, seed=0)[0]
    sites = target.unravel(theta)
    expected = sum(
        prior
        .get(name, prior["*"])
        .distribution(priors.Slot(name, tuple(v.shape), v.shape[-1], name.endswith("bias"), torch.float64, v.device))
        .log_prob(v.double())
        for name, v in sites.items()
    )
    assert target.log_prior(theta).dtype == torch.float32
    assert target.log_prior(theta).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: priors.EmpCov(torch.ones(3)), r"shape \(N, D\) with N >= 2, got \(3,\)"),
        (lambda: priors.EmpCov(torch.ones(1, 3)), "N >= 2"),
        (lambda: priors.EmpCov(torch.full((2, 3), math.nan)), "finite tensor"),
        (lambda: priors.EmpCov([[1.0]]), "got list"),  # type: ignore[arg-type]
        (lambda: priors.EmpCov(torch.ones(2, 3), floor=0.0), "`floor` must be a positive number"),
        (lambda: priors.EmpCov(torch.ones(2, 3), floor=0.5), "`floor` must be below"),
        (lambda: priors.EmpCov(torch.zeros(2, 3)), "do not vary"),
        (lambda: priors.EmpCov(torch.ones(2, 3), scale=-1.0), "`scale` must be a positive number or 'fan_in'"),
        (lambda: priors.EmpCov(torch.ones(2, 3), scale=1.0, gain=2.0), "`gain` only applies"),
        (lambda: priors.EmpCov(torch.ones(2, 3)).distribution(slot((4, 5))), "was made from 3 inputs"),
        (lambda: priors.EmpCov(torch.ones(2, 3)).distribution(slot((3,), is_bias=True)), "first layer only"),
    ],
)
def test_wrong_use_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
