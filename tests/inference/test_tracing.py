"""What the seam refuses, each time naming the site and saying what to do."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from inference.errors import UnsupportedModelError
from inference.target import compile_target
from tests.cases import X, Y, normal


def weights() -> Tensor:
    return pyro.sample("w", normal(3))


def observe(mean: Tensor, y: Tensor | None, scale: Any = 1.0, name: str = "y") -> None:
    with pyro.plate("data", len(mean)):
        pyro.sample(name, dist.Normal(mean, scale), obs=y)


def discrete_latent(x: Tensor, y: Tensor | None = None) -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    observe(x @ weights() + k, y)


def delta_latent(x: Tensor, y: Tensor | None = None) -> None:
    shift = pyro.sample("shift", dist.Delta(torch.tensor(1.0)))
    observe(x @ weights() + shift, y)


def with_param(x: Tensor, y: Tensor | None = None) -> None:
    observe(x @ weights() + pyro.param("offset", torch.zeros(())), y)


class WithPyroParam(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = PyroSample(normal(3))
        self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        observe(x @ torch.as_tensor(self.w), y, self.noise)


def nothing_observed(x: Tensor, y: Tensor | None = None) -> None:
    weights()


def twice_observed(x: Tensor, y: Tensor | None = None) -> None:
    mean = x @ weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        pyro.sample("z", dist.Normal(mean, 2.0), obs=y)


def no_plate(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("y", dist.Normal(x @ weights(), 1.0).to_event(1), obs=y)


def wrong_plate(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    with pyro.plate("groups", 1):
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def nothing_latent(x: Tensor, y: Tensor | None = None) -> None:
    observe(x.sum(-1), y)


def branch_on_a_weight(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    observe(x @ w if w[0] > 0 else -x @ w, y)


def item_of_a_weight(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    observe(x @ w * w[0].item(), y)


def float_of_a_weight(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    observe(x @ w * float(w.sum()), y)


def list_of_weights(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    observe(x @ torch.tensor(w.tolist()), y)


def numpy_of_weights(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    observe(x @ torch.as_tensor(w.detach().numpy()), y)


def changing_sites() -> Callable[..., None]:
    runs = iter(range(1000))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        if next(runs) % 2:
            pyro.sample("sometimes", dist.Normal(0.0, 1.0))
        observe(x @ weights(), y)

    return model


def changing_shape() -> Callable[..., None]:
    runs = iter(range(1000))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("growing", normal(1 + next(runs)))
        observe(x @ weights(), y)

    return model


def moving_support(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("top", dist.HalfNormal(1.0))
    below = pyro.sample("below", dist.Uniform(0.0, top))
    observe(x @ weights() + below, y)


def functional_dropout(x: Tensor, y: Tensor | None = None) -> None:
    observe(nn.functional.dropout(x, 0.5, training=True) @ weights(), y)


def own_noise(x: Tensor, y: Tensor | None = None) -> None:
    observe((x + torch.randn(x.shape)) @ weights(), y)


class Direction(dist.TorchDistribution):
    """Uniform on the sphere, for which no bijection is registered."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.sphere  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size((3,)), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return nn.functional.normalize(torch.ones(3), dim=-1)


def unknown_support(x: Tensor, y: Tensor | None = None) -> None:
    direction = pyro.sample("direction", Direction())
    observe(x @ direction, y)


REFUSED = [
    (discrete_latent, "latent site 'k' is discrete.*sum it out"),
    (delta_latent, "latent site 'shift' is a Delta.*pyro.deterministic"),
    (with_param, "site 'offset' is a `pyro.param`.*give it one with `pyro.sample`"),
    (WithPyroParam(), "site 'noise' is a `pyro.param`"),
    (nothing_observed, "no observed site.*obs=y"),
    (twice_observed, "2 observed sites .'y', 'z'.*to_event"),
    (no_plate, "observed site 'y' is in no plate.*pyro.plate"),
    (wrong_plate, r"observed site 'y' is in plates of size \[1\].*12 data"),
    (nothing_latent, "no latent site"),
    (branch_on_a_weight, "Python decision.*torch.where"),
    (item_of_a_weight, "Python decision.*torch.where"),
    (float_of_a_weight, "Python decision.*torch.where"),
    (list_of_weights, "Python decision.*torch.where"),
    (numpy_of_weights, "Python decision.*torch.where"),
    (changing_sites(), "sites change between runs.*'sometimes'"),
    (changing_shape(), "site 'growing' changes shape between runs"),
    (moving_support, "support of site 'below' depends on other random values.*fixed support"),
    (functional_dropout, "draws random numbers outside `pyro.sample`.*latent site"),
    (own_noise, "draws random numbers outside `pyro.sample`.*latent site"),
    (unknown_support, "latent site 'direction' has the support.*biject_to"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", type(v).__name__))
def test_unsupported_models_are_refused_by_name(model: Callable[..., Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"(?s){message}"):
        compile_target(model, X, Y)


class Net(PyroModule):
    """Holds a layer whose training mode is trouble."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.w = PyroSample(normal(3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        observe(self.inner(x) @ self.w, y)


class Holder:
    """A plain object whose method is the model."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        observe(self.inner(x) @ weights(), y)

    __call__ = model


def closing_over(inner: nn.Module) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        observe(inner(x) @ weights(), y)

    return model


def given(inner: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
    observe(inner(x) @ weights(), y)


def bound(inner: nn.Module) -> Callable[..., None]:
    return functools.partial(given, inner)


@pytest.mark.parametrize("make", [Net, closing_over, bound, Holder, lambda inner: Holder(inner).model])
@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(3), lambda: nn.Sequential(nn.Dropout(0.5))])
def test_modules_in_training_mode_are_refused_and_left_alone(
    make: Callable[[nn.Module], Callable[..., Any]], layer: Callable[[], nn.Module]
) -> None:
    inner = layer()
    before = {k: v.clone() for k, v in inner.state_dict().items()}
    model = make(inner)
    with pytest.raises(UnsupportedModelError, match=r"training mode.*call `.eval\(\)`"):
        compile_target(model, X, Y)
    assert all(torch.equal(v, before[k]) for k, v in inner.state_dict().items())
    inner.eval()
    assert compile_target(model, X, Y).dim == 3


def test_batch_norm_without_running_statistics_is_refused_in_any_mode() -> None:
    model = Net(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedModelError, match="no running statistics"):
        compile_target(model, X, Y)


def test_models_that_need_targets_fit_but_say_why_they_cannot_predict() -> None:
    def sized_by_targets(x: Tensor, y: Tensor | None = None) -> None:
        assert y is not None
        w = weights()
        with pyro.plate("data", y.shape[0]):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    target = compile_target(sized_by_targets, X, Y)
    assert torch.isfinite(target.log_density(torch.zeros(3)))
    with pytest.raises(
        UnsupportedModelError, match="(?s)cannot run without targets.*AssertionError.*take sizes from x"
    ):
        target.likelihood(torch.zeros(3))


def test_models_that_drop_the_observed_site_without_targets_say_so_at_prediction() -> None:
    def silent(x: Tensor, y: Tensor | None = None) -> None:
        mean = x @ weights()
        if y is not None:
            observe(mean, y)

    target = compile_target(silent, X, Y)
    with pytest.raises(UnsupportedModelError, match="observed site 'y' is missing from a run without targets"):
        target.likelihood(torch.zeros(3))


def test_a_data_plate_that_is_not_leftmost_says_so_at_prediction() -> None:
    def sideways(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3, 2))
        with pyro.plate("data", len(x), dim=-1), pyro.plate("outputs", 2, dim=-2):
            pyro.sample("y", dist.Normal((x @ w).T, 1.0), obs=None if y is None else y.T)

    y = torch.stack([Y, -Y], -1)
    target = compile_target(sideways, X, y)
    w = torch.arange(6.0).reshape(3, 2)
    expected = dist.Normal(X @ w, 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(target.log_likelihood(w.reshape(-1)), expected)
    with pytest.raises(UnsupportedModelError, match="leftmost dimension"):
        target.likelihood(torch.zeros(6))


def test_errors_of_the_models_own_come_through_unchanged() -> None:
    def wrong_shapes(x: Tensor, y: Tensor | None = None) -> None:
        observe(x @ pyro.sample("w", normal(5)), y)

    with pytest.raises(RuntimeError, match="size mismatch"):
        compile_target(wrong_shapes, X, Y)


def test_discovery_does_not_depend_on_the_callers_random_state() -> None:
    def sometimes(x: Tensor, y: Tensor | None = None) -> None:
        w = weights()
        observe(x @ w + torch.where(w[0] > 0, 1.0, -1.0), y)

    random.seed(1)
    torch.manual_seed(1)
    first = compile_target(sometimes, X, Y).initial(2, seed=0)
    torch.manual_seed(2)
    assert torch.equal(compile_target(sometimes, X, Y).initial(2, seed=0), first)


def test_targets_outside_the_declared_support_are_refused_by_row() -> None:
    def waiting(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Exponential(rate), obs=y)

    x, y = torch.zeros(3, 1), torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(ValueError, match=r"1 values of y are outside the support of site 'y', Exponential.*row 1"):
        compile_target(waiting, x, y)


def test_class_labels_beyond_the_number_of_classes_are_refused() -> None:
    def labels(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    with pytest.raises(ValueError, match="outside the support"):
        compile_target(labels, torch.zeros(2, 1), torch.tensor([0, 3]))


def counting(seen: list[int], likelihood: Callable[[Tensor], Any], size: int | None = None) -> Callable[..., None]:
    """A linear model of 500 rows that notes how many rows each run takes."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        seen.append(len(x))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", size or len(x)):
            pyro.sample("y", likelihood(x @ w), obs=y)

    return model


def test_sites_are_found_without_a_pass_over_all_data_where_steps_take_fewer() -> None:
    seen: list[int] = []
    x, y = torch.randn(500, 2), torch.ones(500)
    target = compile_target(counting(seen, lambda eta: dist.Bernoulli(logits=eta)), x, y, batch_size=100)
    assert max(seen) == 100
    theta = torch.randn(2)
    torch.testing.assert_close(
        target.log_likelihood(theta).sum(), dist.Bernoulli(logits=x @ theta).log_prob(y).sum(), rtol=1e-10, atol=1e-10
    )


def test_a_target_outside_the_support_is_found_beyond_the_first_rows() -> None:
    y = torch.ones(500)
    y[400] = 2.0
    with pytest.raises(ValueError, match="first at row 400"):
        compile_target(counting([], lambda eta: dist.Bernoulli(logits=eta)), torch.randn(500, 2), y, batch_size=100)


def test_all_rows_are_looked_at_where_a_few_do_not_tell() -> None:
    seen: list[int] = []
    x = torch.randn(500, 2)
    totals = torch.full((500,), 3.0)

    def counts(eta: Tensor) -> Any:
        return dist.Binomial(totals[: len(eta)], logits=eta)

    compile_target(counting(seen, counts), x, torch.ones(500), batch_size=100)
    assert max(seen) == 500
    totals[400] = 0.0
    with pytest.raises(ValueError, match="first at row 400"):
        compile_target(counting([], counts), x, torch.ones(500), batch_size=100)
    seen.clear()
    compile_target(counting(seen, lambda eta: dist.Normal(eta, 1.0), size=500), x, torch.ones(500), batch_size=100)
    assert max(seen) == 500


def test_models_that_hold_an_array_of_all_rows_start_from_their_priors() -> None:
    group, x, y = torch.arange(20) % 4, torch.randn(20, 1), torch.randn(20)

    def varying_intercepts(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("groups", 4):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a[group] + x[:, 0], 1.0), obs=y)

    def latent_function(x: Tensor, y: Tensor | None = None) -> None:
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x))))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    for model, dim in ((varying_intercepts, 4), (latent_function, 20)):
        target = compile_target(model, x, y)
        assert target.initial(3).shape == (3, dim)
        assert target.log_density(target.initial(1)[0]).isfinite()
