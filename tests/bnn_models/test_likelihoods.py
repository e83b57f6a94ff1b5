"""Every likelihood against SciPy, and every wrong shape against its documented error."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

from bnn_models import likelihoods


def log_prob(likelihood: likelihoods.Likelihood, outputs: Tensor, y: Tensor) -> np.ndarray:
    trace = poutine.trace(likelihood).get_trace(outputs, y)
    trace.compute_log_prob()
    return trace.nodes["y"]["log_prob"].numpy()


F = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
REAL = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS, BITS, COUNTS = (
    torch.tensor([0, 3, 1, 2, 2, 0]),
    torch.tensor([0, 1, 1, 0, 1, 0]),
    torch.tensor([0, 1, 4, 2, 0, 7]),
)
F0, F1 = F[:, 0].numpy(), F[:, 1].numpy()


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "y", "expected"),
    [
        (likelihoods.Normal(0.3), 1, REAL, scipy.stats.norm.logpdf(REAL, F0, 0.3)),
        (
            likelihoods.HeteroscedasticNormal(0.01),
            2,
            REAL,
            scipy.stats.norm.logpdf(REAL, F0, np.log1p(np.exp(F1)) + 0.01),
        ),
        (likelihoods.StudentT(5.0, 0.3), 1, REAL, scipy.stats.t.logpdf(REAL, 5.0, F0, 0.3)),
        (likelihoods.Categorical(4), 4, LABELS, scipy.special.log_softmax(F.numpy(), 1)[np.arange(6), LABELS]),
        (likelihoods.Bernoulli(), 1, BITS, scipy.stats.bernoulli.logpmf(BITS, scipy.special.expit(F0))),
        (likelihoods.Poisson(), 1, COUNTS, scipy.stats.poisson.logpmf(COUNTS, np.exp(F0))),
    ],
)
def test_log_prob_per_datum_agrees_with_scipy(
    likelihood: likelihoods.Likelihood, num_outputs: int, y: Tensor, expected: np.ndarray
) -> None:
    assert likelihood.num_outputs(1) == num_outputs
    assert likelihood.target_dim(num_outputs) == 1
    actual = log_prob(likelihood, F[:, :num_outputs], y)
    assert actual.shape == (6,)
    np.testing.assert_allclose(actual, expected, atol=1e-8)
    assert likelihood(F[:, :num_outputs]).shape == (6,)


@pytest.mark.parametrize("likelihood", [likelihoods.Normal(0.3), likelihoods.HeteroscedasticNormal()])
def test_several_targets_are_summed_per_datum(likelihood: likelihoods.Likelihood) -> None:
    y = torch.randn(6, 2)
    outputs = F[:, : likelihood.num_outputs(2)]
    columns = [outputs[:, i::2] for i in range(2)]
    expected = sum(log_prob(likelihood, columns[i], y[:, i]) for i in range(2))
    np.testing.assert_allclose(log_prob(likelihood, outputs, y), expected, atol=1e-10)


@pytest.mark.parametrize(
    "likelihood", [likelihoods.Normal(dist.HalfNormal(2.0)), likelihoods.StudentT(4.0, dist.HalfNormal(2.0))]
)
@pytest.mark.parametrize("num_targets", [1, 2])
def test_a_noise_prior_is_one_scalar_site_outside_the_plate(likelihood: Any, num_targets: int) -> None:
    y = REAL if num_targets == 1 else torch.randn(6, 2)
    trace = poutine.trace(likelihood).get_trace(F[:, :num_targets], y)
    site = trace.nodes["likelihood.scale"]
    assert site["value"].shape == ()
    assert site["cond_indep_stack"] == ()
    assert [frame.name for frame in trace.nodes["y"]["cond_indep_stack"]] == ["data"]
    family = trace.nodes["y"]["fn"].base_dist if num_targets == 2 else trace.nodes["y"]["fn"]
    torch.testing.assert_close(family.scale, site["value"].expand_as(family.scale))


def test_a_noise_prior_built_in_float32_follows_the_outputs() -> None:
    torch.set_default_dtype(torch.float32)
    likelihood = likelihoods.Normal(dist.HalfNormal(2.0))
    trace = poutine.trace(likelihood).get_trace(F[:, :1], REAL)
    assert trace.nodes["likelihood.scale"]["value"].dtype == torch.float64
    assert trace.log_prob_sum().dtype == torch.float64


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "y", "message"),
    [
        (likelihoods.Normal(), 1, REAL[:, None], r"got \(6, 1\); use y.squeeze\(-1\)"),
        (likelihoods.Normal(), 1, REAL[:5], r"y must have shape \(6,\)"),
        (likelihoods.Normal(), 2, REAL, r"y must have shape \(6, 2\)"),
        (likelihoods.HeteroscedasticNormal(), 3, REAL, "reads 2 network outputs per target, got 3"),
        (likelihoods.Categorical(3), 4, LABELS, "3 classes reads as many outputs, got 4"),
        (likelihoods.Categorical(), 1, LABELS, "at least 2, got 1"),
        (likelihoods.Categorical(), 4, LABELS.double(), "integer labels"),
        (likelihoods.Categorical(), 4, LABELS[:, None], r"y must have shape \(6,\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(likelihood: Any, num_outputs: int, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood(F[:, :num_outputs], y)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: likelihoods.Normal(-1.0), "`scale` must be a positive number or a distribution"),
        (lambda: likelihoods.Normal(dist.Normal(0.0, 1.0)), "on positive numbers"),
        (lambda: likelihoods.StudentT(df=0.0), "`df` must be"),
        (lambda: likelihoods.HeteroscedasticNormal(0.0), "`min_scale` must be"),
        (lambda: likelihoods.Categorical(1), "`num_classes` must be"),
        (lambda: likelihoods.Categorical().num_outputs(), "number of classes is not known"),
        (lambda: likelihoods.Normal().num_outputs(0), "`target_dim` must be >= 1"),
    ],
)
def test_wrong_settings_are_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
