"""What goes wrong, on purpose: every backend says where, and leaves the process as it found it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from inference import BACKENDS, MAP, NUTS, ConvergenceWarning, NonFiniteError, UnsupportedModelError
from inference.backend import Bar
from tests.budgets import cheap
from tests.cases import CASES, X, Y

pytestmark = pytest.mark.filterwarnings(
    *(f"ignore::inference.errors.{name}Warning" for name in ("Divergence", "Approximation"))
)

NAMES = list(BACKENDS)
# Pathfinder's line search has no step size.
_NO_STEPS = ("hmc", "nuts", "chees_hmc", "mclmc", "mile", "pathfinder", "pyro_mcmc")
OPTIMISERS = [n for n in NAMES if n not in _NO_STEPS]
QUIET: dict[str, Any] = {"compile": False, "progress": False}
NAN = float("nan")


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def nan_everywhere(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((-1.0 - w.square().sum()).log() + x @ w, 0.5), obs=y)


def impossible_data(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + 1e200, 0.5), obs=y)  # its square overflows


# -- what is not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("model", [nan_everywhere, impossible_data])
@pytest.mark.parametrize("name", NAMES)
def test_a_log_density_that_is_not_finite_at_the_start_is_an_error(name, model):
    with pytest.raises(NonFiniteError, match="step 0|step 1:|at the start"):
        cheap(name).fit(model, X, Y)


@pytest.mark.parametrize("name", ["hmc", "nuts", "mclmc"])
def test_samplers_say_which_rows_have_no_finite_likelihood(name):
    def one_bad_row(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0].sqrt() + x @ w, 0.5), obs=y)

    x = X.abs()
    x[7, 0] = -1.0
    with pytest.raises(NonFiniteError, match=r"'y' is not finite at 1 data, the first at row 7"):
        cheap(name).fit(one_bad_row, x, Y)


def too_large(name: str) -> dict[str, Any]:
    """A step size that leaves all finite numbers."""
    if name.endswith("_laplace"):
        return {"start": MAP(num_steps=20, step_size=1e300, polish=False, **QUIET)}
    steps = {"step_size": 1e300, "num_steps": 20}
    return {**steps, "averaging_step_size": 1e300} if name == "swag" else steps


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimisation_that_diverges_names_the_step_and_what_to_lower(name):
    with pytest.raises(NonFiniteError, match=r"step \d+.*`step_size`|`step_size`.*step \d+"):
        cheap(name, **too_large(name)).fit(linear, X, Y)


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_one_batch_of_a_loader_is_refused_by_row(name):
    x = X.clone()
    x[9, 1] = NAN
    with pytest.raises(ValueError, match="x holds NaN or infinite values in 1 of 12 rows .*row 9"):
        cheap(name).fit(linear, DataLoader(TensorDataset(x, Y), batch_size=4))


def test_nan_in_one_of_several_inputs_is_refused():
    case = next(c for c in CASES if c.name == "dict_inputs")
    spoilt = {**case.x, "numbers": case.x["numbers"].index_fill(0, torch.tensor([3]), NAN)}
    with pytest.raises(ValueError, match="holds NaN or infinite values in 1 of 12 rows .*row 3"):
        cheap("map").fit(case.model(), spoilt, case.y)


# -- interrupts ------------------------------------------------------------------------------


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have Ctrl-C's signal arrive when the progress bar has moved this many times."""
    count = 0
    advance: Callable[..., None] = Bar.advance

    def advance_and_interrupt(self: Bar, *args: Any, **figures: float) -> None:
        nonlocal count
        count += 1
        advance(self, *args, **figures)
        if count == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "advance", advance_and_interrupt)


def test_an_interrupt_during_nuts_returns_the_draws_so_far(monkeypatch):
    backend = NUTS(num_samples=100, warmup_steps=20, num_chains=2, **QUIET)
    whole = backend.fit(linear, X, Y)
    interrupt_after(monkeypatch, 180)  # of 240 iterations; chains advance at paces of their own
    with pytest.warns(ConvergenceWarning, match=r"an interrupt ended the run after \d+ of 100 draws"):
        posterior = backend.fit(linear, X, Y)
    num = posterior.draws.shape[1]
    assert 5 <= num < 100
    assert torch.equal(posterior.draws, whole.draws[:, :num])
    assert posterior.sample_stats["diverging"].shape == (2, num)
    assert "ConvergenceWarning" in dict(posterior.info.warnings)
    assert posterior.info.gradients > 0
    assert torch.isfinite(posterior.predict(X).mean).all()
    assert posterior.to_arviz().posterior.sizes["draw"] == num


@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", NAMES)
def test_an_early_interrupt_ends_the_fit_and_leaves_global_state_as_it_was(name, monkeypatch):
    mine = pyro.param("mine", torch.tensor(2.0))
    before = torch.get_rng_state()
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        cheap(name).fit(linear, X.float(), Y.float())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float64
    assert pyro.param("mine") is mine
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.distributions.Distribution._validate_args


@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", ["map", "nuts", "pyro_guide_vi", "pyro_mcmc"])
def test_a_failed_fit_does_not_spoil_the_next_one(name):
    expected = cheap(name).fit(linear, X, Y).sample(3)
    with pytest.raises(NonFiniteError):
        cheap(name).fit(nan_everywhere, X, Y)
    assert torch.equal(cheap(name).fit(linear, X, Y).sample(3), expected)


# -- models that cannot be had ---------------------------------------------------------------


def with_param(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.param("slope", torch.zeros(3))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope + shift, 0.5), obs=y)


def unobserved(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def observed_twice(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
        pyro.sample("second", dist.Normal(x @ w, 0.5), obs=y)


def branching(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = x @ w if w.sum() > 0 else -x @ w
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.parametrize(
    ("model", "named"),
    [(with_param, "slope"), (unobserved, "observed"), (observed_twice, "second"), (branching, "control flow|branch")],
)
def test_an_unsupported_model_is_refused_with_the_reason(model, named):
    with pytest.raises(UnsupportedModelError, match=named):
        cheap("nuts").fit(model, X, Y)


@pytest.mark.parametrize("name", [n for n in NAMES if "minibatches" in BACKENDS[n].capabilities])
def test_minibatches_of_a_model_with_latents_per_datum_are_refused_by_the_site(name):
    case = next(c for c in CASES if c.local)
    with pytest.raises(UnsupportedModelError, match="'effect' has one value per datum"):
        cheap(name, batch_size=4).fit(case.model(), case.x, case.y)
