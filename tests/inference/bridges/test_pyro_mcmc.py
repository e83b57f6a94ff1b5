import random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor

from inference.bridges import PyroMCMC
from inference.errors import DivergenceWarning
from inference.point import MAP, Subset
from tests.conjugate import beta_bernoulli, linear_regression
from tests.tolerances import assert_mean, assert_variance

PROBLEM = linear_regression()
STEADY = {"step_size": 0.1, "adapt_step_size": False}


def test_nuts_finds_a_conjugate_posterior() -> None:
    posterior = PyroMCMC(num_samples=250, warmup_steps=100, num_chains=2).fit(PROBLEM.model, PROBLEM.x, PROBLEM.y)
    assert posterior.draws.shape == (2, 250, 3)
    assert not torch.equal(posterior.draws[0], posterior.draws[1])
    assert_mean(posterior.draws, PROBLEM.mean)
    assert_variance(posterior.draws, PROBLEM.covariance.diag(), PROBLEM.mean)
    assert posterior.info.gradients > 2 * 250 * 3


@pytest.mark.parametrize(
    ("kernel", "options", "num_samples"),
    [("HMC", {"trajectory_length": 1.0}, 200), ("RandomWalkKernel", {"init_step_size": 0.3}, 2000)],
)
def test_other_kernels_find_the_mean_of_a_constrained_site(
    kernel: str, options: dict[str, Any], num_samples: int
) -> None:
    problem = beta_bernoulli()
    backend = PyroMCMC(kernel, options=options, num_samples=num_samples, warmup_steps=100)
    posterior = backend.fit(problem.model, problem.x, problem.y)
    draws = posterior.target.unravel(posterior.draws)[problem.site]
    assert_mean(draws.reshape(2, num_samples), problem.mean.squeeze())


def test_a_restricted_target_gives_the_conditional() -> None:
    def two(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)

    x = torch.linspace(-1, 2, 20)
    y = 1.0 + x
    backend = Subset(PyroMCMC(num_samples=200, warmup_steps=50), sites="a", rest=MAP(num_steps=200))
    posterior = backend.fit(two, x, y)
    b = posterior.sample_sites(20)["b"]
    assert b.unique().numel() == 1
    precision = 1 + 20 / 0.25
    assert_mean(posterior.draws, (y - b[0] * x).sum() / 0.25 / precision)


def test_divergences_are_counted_and_warned_of() -> None:
    def funnel(x: Tensor, y: Tensor | None = None) -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("z", dist.Normal(torch.zeros(5), (v / 2).exp()).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    zeros = torch.zeros(2)
    backend = PyroMCMC(options={"step_size": 2.0, "adapt_step_size": False}, num_samples=30, warmup_steps=0)
    with pytest.warns(DivergenceWarning, match="of 60 draws diverged"):
        posterior = backend.fit(funnel, zeros, zeros)
    assert posterior.info.extra["divergences"] > 0
    assert posterior.info.warnings[0][0] == "DivergenceWarning"


@pytest.mark.parametrize("num_samples", [1, 3])
def test_few_draws_are_enough(num_samples: int) -> None:
    posterior = PyroMCMC(num_samples=num_samples, warmup_steps=2, options=STEADY).fit(
        PROBLEM.model, PROBLEM.x, PROBLEM.y
    )
    assert posterior.draws.shape == (2, num_samples, 3)


def test_same_seed_same_draws_and_nothing_global_changes() -> None:
    pyro.param("mine", torch.tensor(3.0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    backend = PyroMCMC(num_samples=4, warmup_steps=2, options=STEADY)
    first, again, other = (backend.fit(PROBLEM.model, PROBLEM.x, PROBLEM.y, seed=s).draws for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_a_chain_is_the_same_whatever_the_number_beside_it() -> None:
    two, three = (
        PyroMCMC(num_samples=4, warmup_steps=2, num_chains=c, options=STEADY)
        .fit(PROBLEM.model, PROBLEM.x, PROBLEM.y)
        .draws
        for c in (2, 3)
    )
    assert torch.equal(two, three[:2])


def test_the_repr_re_creates_the_backend() -> None:
    backend = PyroMCMC(NUTS, options={"max_tree_depth": 4})
    assert backend == PyroMCMC("NUTS", options={"max_tree_depth": 4})
    assert eval(repr(backend)) == backend


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kernel": "Gibbs"}, ValueError, "has no 'Gibbs'; try 'NUTS'"),
        ({"kernel": 3}, TypeError, "`kernel` must be a name or a class"),
        ({"num_samples": 0}, ValueError, "`num_samples` must be an integer >= 1, got 0"),
        ({"warmup_steps": -1}, ValueError, "`warmup_steps` must be an integer >= 0, got -1"),
        ({"likelihood_temperature": 2.0}, ValueError, "PyroMCMC has no temperature"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PyroMCMC(**fields)
