"""What every backend promises, whatever its method: one contract over all of BACKENDS and the models of cases.py.

The fits here are far from converged (see budgets.py): only promises that hold for any fit are tested. A backend that
cannot do something says so in its capabilities, and then the documented error is what is asserted.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch.utils.data import DataLoader, TensorDataset

import inference
from inference import BACKENDS, CapabilityError, Posterior, Subset, UnsupportedModelError, compile_target, storage
from inference.errors import ConvergenceWarning
from inference.posterior import DrawsPosterior, GaussianPosterior
from tests.budgets import CHEAP, SMALLEST, cheap
from tests.cases import CASES, Case, N, X, Y
from tests.tolerances import z_limit

# On these budgets nothing converges, and backends say so; the promises below do not depend on it.
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore::inference.errors.{name}Warning" for name in ("Convergence", "Divergence", "Approximation"))
)

NAMES = list(BACKENDS)
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
# A module, a simplex, labels, vector targets, P = 1, N = 1; the others run with the slow tests.
SELECTED = ["pyro_module", "simplex", "categorical", "two_outputs", "one_number", "one_datum"]
MAIN = BY_NAME["broadcasting"]  # a vector site, a positive scalar site, and extra dimensions pass through
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@functools.cache
def fitted(name: str, case: str = "broadcasting", seed: int = 0) -> Posterior:
    """A fit shared by tests that do not change it."""
    chosen = BY_NAME[case]
    return cheap(name).fit(chosen.model(), chosen.x, chosen.y, seed=seed)


@functools.cache
def target_of(case: str) -> Any:
    """A target that all backends share, so that its model is recorded once."""
    chosen = BY_NAME[case]
    return compile_target(chosen.model(), chosen.x, chosen.y)


def fit_main(name: str, **changes: Any) -> Posterior:
    """A fit of its own to the main case."""
    return cheap(name, **changes).fit_to(target_of(MAIN.name))


def thetas(posterior: Posterior) -> torch.Tensor:
    """All draws, or some of a continuous posterior, (S, P)."""
    return posterior.draws.flatten(0, 1) if isinstance(posterior, DrawsPosterior) else posterior.sample(8, seed=3)


def num_distinct(values: torch.Tensor) -> int:
    return len(torch.unique(values.reshape(len(values), -1), dim=0))


def with_capability(capability: str) -> list[str]:
    return [name for name in NAMES if capability in BACKENDS[name].capabilities]


def without_capability(capability: str) -> list[str]:
    return [name for name in NAMES if capability not in BACKENDS[name].capabilities]


def test_every_backend_has_a_cheap_budget():
    assert set(CHEAP) == set(SMALLEST) == set(BACKENDS)


# -- fits ----------------------------------------------------------------------


@pytest.mark.parametrize("case", SELECTED)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_model_fits_and_predicts(name, case):
    target = target_of(case)
    posterior = cheap(name).fit_to(target)
    draws = posterior.sample(3, seed=1)
    assert draws.shape == (3, target.dim)
    assert draws.dtype == target.dtype
    assert draws.device == target.device
    assert torch.isfinite(draws).all()
    assert posterior.mean_theta.shape == (target.dim,)
    for site in target.sites:
        values = posterior.sample_sites(3, seed=1)[site.name]
        assert values.shape == (3, *site.shape)
        assert site.support.check(values).all()
    prediction = posterior.predict(target.x, num_samples=3)
    per_datum = (3,) if target.family().kind == "categorical" else target.y.shape[1:]
    assert prediction.mean.shape == (target.num_data, *per_datum)
    assert torch.isfinite(prediction.mean).all()
    assert torch.isfinite(prediction.log_prob(target.y)).all()
    assert (prediction.variance >= 0).all()


# Pyro has no bijection of its own onto lower_cholesky, and its guides and kernels insist on plates of the data's size.
BEYOND_PYRO = [
    ("pyro_guide_vi", "lower_cholesky"),
    ("pyro_guide_vi", "subsampling"),
    ("pyro_mcmc", "lower_cholesky"),
    ("pyro_mcmc", "subsampling"),
    ("pyro_mcmc", "subsampling_by_index"),
]
# The prior's precision is what these methods measure directions in, and a Laplace prior has no curvature.
NEED_CURVATURE = [(name, "plated_weights") for name in ("low_rank_laplace", "sampled_laplace")]
OTHERS = [(n, c.name) for n in NAMES for c in CASES if c.name not in SELECTED and not c.local]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [pair for pair in OTHERS if pair not in BEYOND_PYRO + NEED_CURVATURE])
def test_every_other_model_fits_and_predicts(name, case):
    test_every_kind_of_model_fits_and_predicts(name, case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), NEED_CURVATURE)
def test_a_prior_without_curvature_is_refused_where_it_is_needed(name, case):
    with pytest.raises(ValueError, match="give that site a prior with curvature"):
        cheap(name).fit_to(target_of(case))


@pytest.mark.parametrize(("name", "case"), BEYOND_PYRO)
def test_what_pyro_cannot_do_the_bridges_refuse(name, case):
    with pytest.raises((NotImplementedError, ValueError), match=r"Cannot transform|plate|subsample"):
        cheap(name).fit_to(target_of(case))


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_a_fit_is_recorded(name):
    info = fitted(name).info
    assert info.gradients > 0
    assert info.seconds > 0
    assert info.peak_bytes >= 0
    assert all(kind in vars(inference.errors) for kind, _ in info.warnings)


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_asked_for_the_least_still_fits_predicts_and_exports(name):
    posterior = fit_main(name, **SMALLEST[name])
    assert torch.isfinite(posterior.predict(X, num_samples=1).mean).all()
    assert posterior.to_arviz(num_samples=4).posterior.sizes["draw"] >= 4
    assert str(posterior.diagnose())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_device_of_the_data_are_those_of_everything(name, device):
    x, y = X.to(device, torch.float32), Y.to(device, torch.float32)
    posterior = cheap(name).fit(MAIN.model(), x, y)
    assert posterior.mean_theta.dtype == posterior.sample(2).dtype == torch.float32
    assert posterior.sample(2).device.type == device
    prediction = posterior.predict(x, num_samples=2)
    assert prediction.mean.dtype == prediction.stddev.dtype == torch.float32
    assert prediction.mean.device.type == device
    assert torch.get_default_dtype() == torch.float64


# -- randomness and side effects ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_draws_whatever_the_global_state_which_stays(name):
    expected = thetas(fitted(name))
    mine = pyro.param("mine", torch.tensor(2.0))
    torch.manual_seed(77)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    posterior = fit_main(name)
    assert torch.equal(thetas(posterior), expected)
    posterior.predict(X, num_samples=3).sample(2)
    posterior.to_arviz(num_samples=4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine
    assert torch.distributions.Distribution._validate_args


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_other_draws(name):
    other = cheap(name).fit_to(target_of(MAIN.name), seed=1)
    assert not torch.isclose(thetas(fitted(name)), thetas(other)).all(1).any()


@pytest.mark.parametrize("name", NAMES)
def test_fitting_leaves_the_model_alone(name):
    model = BY_NAME["frozen_features"].model(1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    posterior = cheap(name).fit(model, X, Y)
    posterior.predict(X, num_samples=2)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# -- as a Pyro guide ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parallel_predictive_gives_distinct_draws(name):
    posterior = fitted(name)
    num = posterior.draws.shape[0] * posterior.draws.shape[1] if isinstance(posterior, DrawsPosterior) else 8
    available = num_distinct(thetas(posterior)) if isinstance(posterior, DrawsPosterior) else num
    found = Predictive(MAIN.model(), guide=posterior, num_samples=num, parallel=True)(X)
    assert found["w"].reshape(num, -1).shape == (num, 3)
    assert num_distinct(found["w"]) == available
    assert found["y"].reshape(num, N).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_sequential_predictive_draws_from_the_posterior(name):
    posterior, chosen = fitted(name, "dict_inputs"), BY_NAME["dict_inputs"]
    found = Predictive(chosen.model(), guide=posterior, num_samples=6, return_sites=("w", "table", "y"))(chosen.x)
    assert found["y"].shape == (6, N)
    drawn = torch.cat([found["w"].reshape(6, 3), found["table"].reshape(6, 3)], -1)  # Pyro adds a dimension per plate
    if isinstance(posterior, DrawsPosterior):
        assert all((thetas(posterior) == value).all(1).any() for value in drawn)
    else:
        assert num_distinct(drawn) == 6


@pytest.mark.parametrize("name", NAMES)
def test_predict_agrees_with_pyros_predictive(name):
    posterior = fitted(name)
    if isinstance(posterior, GaussianPosterior):  # a linearised prediction is another one by design
        posterior = GaussianPosterior(posterior.target, posterior.gaussian, backend=posterior.backend)
    num = 2000
    draws = Predictive(MAIN.model(), guide=posterior, num_samples=num, parallel=True)(X)["y"].reshape(num, N)
    prediction = posterior.predict(X, num_samples=None if isinstance(posterior, DrawsPosterior) else num)
    for q in (0.1, 0.5, 0.9):  # not the variance: noise that is log-normal over draws has heavy tails
        below = (draws < prediction.quantile(q)).double().mean(0)
        z = (below - q) / (2 * q * (1 - q) / num) ** 0.5
        assert z.abs().max() < z_limit(3 * N)


# -- reports ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_to_arviz_has_all_groups_with_named_dimensions(name):
    posterior = fitted(name)
    data = posterior.to_arviz(num_samples=5)
    groups = {"posterior", "posterior_predictive", "prior", "log_likelihood", "observed_data", "sample_stats"}
    assert groups <= set(data.groups())
    assert data.posterior["w"].dims == ("chain", "draw", "w_dim_0")
    assert data.posterior["noise"].dims == ("chain", "draw")
    assert data.log_likelihood["y"].dims == data.posterior_predictive["y"].dims == ("chain", "draw", "obs_id")
    assert data.observed_data["y"].dims == ("obs_id",)
    assert np.array_equal(data.observed_data["y"], Y)
    if "chains" in BACKENDS[name].capabilities:
        assert dict(data.posterior.sizes)["chain"] == 2
        assert np.array_equal(data.posterior["w"], posterior.target.unravel(posterior.draws)["w"])
    else:
        assert dict(data.posterior.sizes)["chain"] == 1
    assert data.attrs["backend"] == repr(posterior.backend)


@pytest.mark.parametrize("name", NAMES)
def test_the_diagnosis_names_the_backend_and_prints(name):
    diagnosis = fitted(name).diagnose(X[:4])
    assert diagnosis.backend == BACKENDS[name].cls.__name__
    assert diagnosis.backend in str(diagnosis)


@pytest.mark.parametrize("name", NAMES)
def test_saving_is_exact_and_both_objects_go_on_working(name, tmp_path):
    posterior, chosen = fitted(name, "dict_inputs"), BY_NAME["dict_inputs"]
    expected = thetas(posterior), posterior.predict(chosen.x, num_samples=4).mean
    posterior.save(tmp_path)
    loaded = inference.load(tmp_path, chosen.model())
    for one in (posterior, loaded):
        assert torch.equal(thetas(one), expected[0])
        assert torch.equal(one.predict(chosen.x, num_samples=4).mean, expected[1])
        assert Predictive(chosen.model(), guide=one, num_samples=2)(chosen.x)["y"].shape == (2, N)
    assert type(loaded) is type(posterior)
    assert repr(loaded.backend) == repr(posterior.backend)
    assert loaded.info == posterior.info
    assert loaded.log_evidence_or_none == posterior.log_evidence_or_none
    loaded.save(tmp_path / "again")
    (record, tensors), (saved_record, saved) = storage.read(tmp_path / "again"), storage.read(tmp_path)
    assert record == saved_record
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[key], saved[key]) for key in saved)


# -- starting points and parts ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_posterior_a_dict_and_a_tensor_are_the_same_starting_point(name):
    target = target_of(MAIN.name)
    sites = {"w": torch.tensor([0.1, -0.2, 0.3]), "noise": torch.tensor(0.5)}
    point = target.ravel(sites)
    backend = cheap(name, **SMALLEST[name])
    from_dict = thetas(backend.fit_to(target, init=sites))
    held = DrawsPosterior(target, point[None, None], backend=None)
    assert torch.equal(thetas(backend.fit_to(target, init=held)), from_dict)
    assert torch.equal(target.initial(1, init=point)[0], point)


@pytest.mark.parametrize("name", NAMES)
def test_a_subset_leaves_the_other_sites_at_the_point(name):
    backend = Subset(cheap(name), sites="w", rest=None)
    posterior = backend.fit_to(target_of(MAIN.name), init={"w": torch.zeros(3), "noise": torch.tensor(0.5)})
    sites = posterior.sample_sites(4)
    assert sites["w"].shape == (4, 3)
    assert sites["w"].abs().max() > 0
    torch.testing.assert_close(sites["noise"], torch.full((4,), 0.5))
    prediction = posterior.predict(X, num_samples=4)
    torch.testing.assert_close(prediction.aleatoric_variance, torch.full((N,), 0.25))
    assert posterior.backend == backend
    assert eval(repr(backend), vars(inference)) == backend


# -- capabilities ----------------------------------------------------------------------


@pytest.mark.parametrize("name", with_capability("log_density"))
def test_the_log_density_is_that_of_the_draws(name):
    posterior = fitted(name)
    assert posterior.has_log_density
    draws = posterior.sample(4000, seed=5)
    scale = posterior.gaussian.variance.sqrt()
    # E[exp(log r - log q)] = 1 for any normalised r with lighter tails, here q itself at half the width.
    centred = (draws - posterior.mean_theta) @ torch.linalg.inv(
        torch.linalg.cholesky(posterior.gaussian.covariance())
    ).T
    log_normal = -0.5 * centred.square().sum(-1) - 0.5 * posterior.target.dim * np.log(2 * np.pi)
    volume = torch.linalg.slogdet(posterior.gaussian.covariance())[1] / 2
    torch.testing.assert_close(posterior.log_density(draws), log_normal - volume, rtol=1e-6, atol=1e-6)
    z = (draws.mean(0) - posterior.mean_theta) / (scale / len(draws) ** 0.5)
    assert z.abs().max() < z_limit(posterior.target.dim)


@pytest.mark.parametrize("name", without_capability("log_density"))
def test_a_backend_without_a_density_says_which_have_one(name):
    posterior = fitted(name)
    assert not posterior.has_log_density
    with pytest.raises(CapabilityError, match=BACKENDS[name].cls.__name__) as caught:
        posterior.log_density(posterior.mean_theta)
    assert all(BACKENDS[other].cls.__name__ in str(caught.value) for other in with_capability("log_density"))


@pytest.mark.parametrize("name", with_capability("log_evidence"))
def test_the_log_evidence_is_a_number(name):
    assert np.isfinite(fitted(name).log_evidence)


@pytest.mark.parametrize("name", without_capability("log_evidence"))
def test_a_backend_without_log_evidence_says_which_have_one(name):
    with pytest.raises(CapabilityError, match=BACKENDS[name].cls.__name__) as caught:
        _ = fitted(name).log_evidence
    assert all(BACKENDS[other].cls.__name__ in str(caught.value) for other in with_capability("log_evidence"))


@pytest.mark.parametrize("name", with_capability("temperature"))
def test_both_temperatures_reach_the_target(name):
    posterior = fit_main(name, temperature=2.0, likelihood_temperature=3.0)
    assert (posterior.target.temperature, posterior.target.likelihood_temperature) == (2.0, 3.0)
    assert torch.isfinite(thetas(posterior)).all()
    assert not torch.equal(thetas(posterior), thetas(fitted(name)))


@pytest.mark.parametrize("field", ["temperature", "likelihood_temperature"])
@pytest.mark.parametrize("name", without_capability("temperature"))
def test_a_backend_without_a_temperature_refuses_it_by_name(name, field):
    with pytest.raises(ValueError, match=f"{BACKENDS[name].cls.__name__} has no temperature"):
        cheap(name, **{field: 2.0})


@pytest.mark.parametrize("name", with_capability("chains"))
def test_a_chain_does_not_depend_on_the_chains_beside_it(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "one chain cannot show")
        alone, beside = fit_main(name, num_chains=1, allow_one_chain=True), fitted(name)
    assert alone.draws.shape == (1, 6, 4)
    assert beside.draws.shape == (2, 6, 4)
    torch.testing.assert_close(alone.draws[0], beside.draws[0], rtol=1e-8, atol=1e-8)
    assert not torch.isclose(beside.draws[0], beside.draws[1]).all()


@pytest.mark.parametrize("name", with_capability("chains"))
def test_a_single_chain_is_refused_before_any_sampling_unless_it_is_asked_for_twice(name):
    with pytest.raises(ValueError, match="`num_chains`=1: R-hat compares chains.*better 4, or set `allow_one_chain"):
        cheap(name, num_chains=1)
    with pytest.warns(ConvergenceWarning, match="one chain cannot show whether it has mixed"):
        posterior = fit_main(name, num_chains=1, allow_one_chain=True)
    assert sum("one chain" in text for _, text in posterior.info.warnings) == 1


@pytest.mark.parametrize("name", without_capability("chains"))
def test_a_backend_without_chains_has_no_such_field(name):
    with pytest.raises(TypeError, match="num_chains"):
        cheap(name, num_chains=2)


@pytest.mark.parametrize("name", NAMES)
def test_draws_have_one_row_per_chain_or_the_error_names_alternatives(name):
    posterior = fitted(name)
    if isinstance(posterior, DrawsPosterior):
        assert posterior.draws.shape[0] == (2 if "chains" in BACKENDS[name].capabilities else 1)
    else:
        with pytest.raises(CapabilityError, match="sample"):
            _ = posterior.draws


def loader(size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=size, shuffle=True)


@pytest.mark.parametrize("name", with_capability("minibatches"))
def test_minibatches_come_from_a_field_or_a_loader(name):
    by_field = cheap(name, batch_size=4).fit(MAIN.model(), X, Y)
    by_loader = cheap(name, batch_size=None).fit(MAIN.model(), loader(4))
    assert by_field.target.num_data == by_loader.target.num_data == N
    assert torch.equal(thetas(by_field), thetas(by_loader))


@pytest.mark.parametrize("name", without_capability("minibatches"))
def test_a_backend_without_minibatches_has_no_such_field_and_takes_a_loader_whole(name):
    with pytest.raises(TypeError, match="batch_size"):
        cheap(name, batch_size=4)
    # The way to a Laplace mode may take minibatches; the approximation itself does not.
    backend = cheap(name, **({"start": None} if "start" in BACKENDS[name].cls.field_names() else {}))
    whole = backend.fit_to(target_of(MAIN.name), init=torch.zeros(4))
    assert torch.equal(thetas(backend.fit(MAIN.model(), loader(4), init=torch.zeros(4))), thetas(whole))


# -- hyperparameters ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_repr_makes_the_same_backend_again(name):
    for backend in (BACKENDS[name].cls(), cheap(name)):
        assert eval(repr(backend), vars(inference)) == backend


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_cannot_be_changed(name):
    backend = cheap(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.temperature = 2.0
    assert dataclasses.replace(backend, progress=None) != backend


def bad_values() -> list[tuple[str, str, Any]]:
    """A value out of range for every hyperparameter, from the type of its default."""
    rows: list[tuple[str, str, Any]] = []
    for name, entry in BACKENDS.items():
        for field in dataclasses.fields(entry.cls):
            default = getattr(entry.cls(), field.name)
            if field.name in ("progress", "options", "start") or isinstance(default, bool):
                continue
            if isinstance(default, str):
                values: tuple[Any, ...] = ("nonsense", -1.0)
            elif isinstance(default, int):
                values = (-1, 1.5, True)
            elif isinstance(default, float):
                values = (-1.0, float("nan"))
            else:
                values = (-1,)
            rows += [(name, field.name, value) for value in values]
    return rows


@pytest.mark.parametrize(("name", "field", "value"), bad_values())
def test_a_hyperparameter_out_of_range_is_refused_by_name(name, field, value):
    with pytest.raises((ValueError, TypeError), match=rf"`{field}`.*got|has no 'nonsense'") as caught:
        cheap(name, **{field: value})
    assert str(value) in str(caught.value)


# -- bad input ----------------------------------------------------------------------


def untouched(x, y=None):
    raise AssertionError("the model ran before the data were checked")


def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy[4] = value
    return copy


BAD_DATA = {
    "nan_x": (
        lambda: (spoilt(X, float("nan")), Y),
        ValueError,
        "x holds NaN or infinite values in 1 of 12 rows .*row 4",
    ),
    "inf_y": (
        lambda: (X, spoilt(Y, float("inf"))),
        ValueError,
        "y holds NaN or infinite values in 1 of 12 rows .*row 4",
    ),
    "empty": (lambda: (X[:0], Y[:0]), ValueError, "x is empty"),
    "mismatch": (lambda: (X, Y[:5]), ValueError, r"x has 12 rows but y has shape \(5,\)"),
    "array_x": (lambda: (X.numpy(), Y), TypeError, "x must be a torch.Tensor.*ndarray"),
    "list_y": (lambda: (X, Y.tolist()), TypeError, "y must be a torch.Tensor, got list"),
    "no_y": (lambda: (X, None), TypeError, "fit needs targets"),
    "scalar_y": (lambda: (X, Y[0]), ValueError, "first dimensions must agree"),
    "uneven_dict": (lambda: ({"a": X, "b": X[:3]}, Y), ValueError, "same first dimension"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
@pytest.mark.parametrize("name", NAMES)
def test_bad_data_are_refused_before_the_model_runs(name, kind):
    make, error, text = BAD_DATA[kind]
    with pytest.raises(error, match=text):
        cheap(name).fit(untouched, *make())


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_a_whole_number_from_zero(name, seed):
    with pytest.raises(ValueError, match=f"`seed` must be an integer >= 0, got {seed}"):
        cheap(name).fit_to(target_of(MAIN.name), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_starting_point_that_does_not_fit_is_refused(name):
    target, backend = target_of(MAIN.name), cheap(name)
    with pytest.raises(ValueError, match="`init` belongs to another model.*'mean'"):
        backend.fit_to(target, init=fitted("map", "one_number"))
    with pytest.raises(ValueError, match=r"`init` must have shape \(4,\)"):
        backend.fit_to(target, init=torch.zeros(5))
    with pytest.raises(ValueError, match="`init` holds NaN"):
        backend.fit_to(target, init=torch.full((4,), float("nan")))
    with pytest.raises(ValueError, match="no value for site 'noise'"):
        backend.fit_to(target, init={"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="`init` must be a posterior, a dict of sites or a tensor, got str"):
        backend.fit_to(target, init="map")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_cannot_be_recorded_is_refused_by_the_site(name):
    def discrete(x, y=None):
        pyro.sample("switch", dist.Bernoulli(0.5))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match="'switch'"):
        cheap(name).fit(discrete, X, Y)


@pytest.mark.parametrize("name", NAMES)
def test_new_inputs_unlike_the_training_inputs_are_refused(name):
    posterior = fitted(name)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\).*\(3,\)"):
        posterior.predict(X[:, :2])
    with pytest.raises(TypeError, match="float32"):
        posterior.predict(X.float())
    with pytest.raises(ValueError, match="x holds NaN"):
        posterior.predict(spoilt(X, float("nan")))
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
        posterior.predict(X, num_samples=0)
