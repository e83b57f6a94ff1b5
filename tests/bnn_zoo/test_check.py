"""The judge of `bnn-zoo check`: it must let the right posteriors pass, and only those."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bnn_zoo import check as check_module
from bnn_zoo.check import EXPECTED, NOISE, Problem, check, judge, problem
from bnn_zoo.cli import app
from inference import MAP, NUTS, DenseLaplace, DrawsPosterior, GaussianPosterior, MeanFieldVI, Posterior, compile_target
from inference.backend import Backend
from inference.distributions import DenseGaussian, DiagonalGaussian
from inference.registry import BACKENDS


@pytest.fixture
def truth() -> Problem:
    return problem()


def gaussian(truth: Problem, backend: Backend, shift: float = 0.0, widen: float = 1.0) -> Posterior:
    """The exact posterior, moved by a share of its standard deviations and with its variance multiplied."""
    target = compile_target(truth.model, truth.x, truth.y)
    covariance = torch.as_tensor(np.linalg.inv(truth.precision))
    loc = torch.as_tensor(truth.mean) + shift * covariance.diagonal().sqrt()
    return GaussianPosterior(
        target, DenseGaussian(loc, scale_tril=torch.linalg.cholesky(widen * covariance)), backend=backend
    )


def test_closed_form_is_the_mode_and_curvature_of_the_models_own_log_density(truth: Problem) -> None:
    target = compile_target(truth.model, truth.x, truth.y)
    mode = torch.as_tensor(truth.mean)
    assert torch.func.grad(target.log_density)(mode).abs().max() < 1e-8
    hessian = torch.func.hessian(target.log_density)(mode)
    np.testing.assert_allclose(-hessian.numpy(), truth.precision, rtol=1e-8, atol=1e-8)
    assert NOISE == 0.5


def test_exact_gaussian_is_exact_and_a_shifted_or_wide_one_is_wrong(truth: Problem) -> None:
    backend = DenseLaplace()
    assert judge(gaussian(truth, backend), backend, truth).verdict == "exact"
    shifted = judge(gaussian(truth, backend, shift=0.1), backend, truth)
    assert shifted.verdict == "wrong"
    assert "a mean is off by 0.1 posterior sd" in shifted.verdict_line()
    assert judge(gaussian(truth, backend, widen=1.1), backend, truth).verdict == "wrong"


def test_mean_field_is_held_to_its_own_variances_and_not_to_the_exact_ones(truth: Problem) -> None:
    backend = MeanFieldVI()
    target = compile_target(truth.model, truth.x, truth.y)
    scale = torch.as_tensor(np.diag(truth.precision) ** -0.5)
    own = GaussianPosterior(target, DiagonalGaussian(torch.as_tensor(truth.mean), scale), backend=backend)
    assert judge(own, backend, truth).verdict == "biased as documented"
    assert judge(gaussian(truth, backend), backend, truth).verdict == "wrong"


def test_point_with_a_spread_is_wrong(truth: Problem) -> None:
    assert judge(gaussian(truth, MAP()), MAP(), truth).verdict == "wrong"


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "exact"), (0.5, "wrong")])
def test_sampler_is_judged_by_its_own_standard_error(truth: Problem, shift: float, verdict: str) -> None:
    draws = gaussian(truth, NUTS(), shift).sample(2000, seed=1).reshape(4, 500, -1)
    posterior = DrawsPosterior(compile_target(truth.model, truth.x, truth.y), draws, backend=NUTS())
    found = judge(posterior, NUTS(), truth)
    assert found.verdict == verdict
    assert found.unit == "standard errors"


def test_every_backend_has_an_expectation() -> None:
    assert set(EXPECTED) == set(BACKENDS)


def test_diagonal_laplace_is_biased_as_documented() -> None:
    found = check("diagonal_laplace", ["diagonal_laplace.start.num_steps=200"])
    assert found.verdict == "biased as documented"
    assert (found.variance < 0.9 * found.exact_variance).all()


def test_command_ends_with_code_1_on_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["check", "map", "--set", "map.num_steps=50"]
    right = CliRunner().invoke(app, arguments)
    assert right.exit_code == 0
    assert "verdict: biased as documented" in right.stdout
    monkeypatch.setitem(check_module.EXPECTED, "map", check_module.Expectation("exact", 0.02, 1.02))
    wrong = CliRunner().invoke(app, arguments)
    assert wrong.exit_code == 1
    assert "verdict: wrong" in wrong.stdout
