import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import CapabilityError, load
from inference.diagnostics import convergence
from inference.errors import ConvergenceWarning
from inference.mcmc import HMC, NUTS
from inference.mcmc.draw_file import DrawFile, next_checksum
from inference.mcmc.recording import Recorder, Recording
from inference.partial import PartialDrawsPosterior
from inference.posterior import DrawsPosterior
from inference.target import Target, compile_target
from tests.inference.mcmc.sampling import data

FIELDS: dict[str, Any] = {
    "num_samples": 25,
    "warmup_steps": 20,
    "num_chains": 2,
    "progress": False,
    "compile": False,
}


def model(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("layer.weight", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
    bias = pyro.sample("layer.bias", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Gamma(4.0, 8.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal((x @ weight)[:, 0] + bias, noise), obs=y)


@cache
def target() -> Target:
    return compile_target(model, *data())


def fit(sampler: type = NUTS, **changes: Any) -> DrawsPosterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of short chains; what they say is not the point here
        posterior = sampler(**{**FIELDS, **changes}).fit_to(target(), seed=1)
    assert isinstance(posterior, DrawsPosterior)
    return posterior


@cache
def whole() -> DrawsPosterior:
    return fit()


def test_thinning_keeps_every_third_draw_and_sums_up_the_rest() -> None:
    every, thinned = whole(), fit(thinning=3)
    assert torch.equal(thinned.draws, every.draws[:, 2:24:3])

    def groups(name: str) -> Tensor:
        return every.sample_stats[name][:, :24].reshape(2, 8, 3)

    stats = thinned.sample_stats
    assert torch.equal(stats["n_steps"], groups("n_steps").sum(-1))
    assert torch.equal(stats["tree_depth"], groups("tree_depth").amax(-1))
    assert torch.equal(stats["diverging"], groups("diverging").any(-1))
    assert torch.equal(stats["lp"], groups("lp")[..., -1])
    torch.testing.assert_close(stats["acceptance_rate"], groups("acceptance_rate").mean(-1), rtol=1e-12, atol=0)
    assert {k: v.dtype for k, v in stats.items()} == {k: v.dtype for k, v in every.sample_stats.items()}


def test_draws_on_disk_are_the_draws_in_memory(tmp_path: Path) -> None:
    x, _ = data()
    found = fit(draws_on_disk=tmp_path)
    assert torch.equal(found.draws, whole().draws)
    assert np.array_equal(np.load(tmp_path / "draws.npy"), whole().draws.numpy())
    for num in (None, 7):
        assert torch.equal(found.predict(x, num_samples=num).mean, whole().predict(x, num_samples=num).mean)
    assert torch.equal(found.sample(9, seed=3), whole().sample(9, seed=3))
    assert torch.equal(found.mean_theta, whole().mean_theta)
    found.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", model).draws, whole().draws)


def test_function_values_are_recorded_on_the_way() -> None:
    x, _ = data()
    found = fit(probe_inputs=x[:5])
    assert found.probe_values is not None
    assert torch.equal(found.draws, whole().draws)
    expected = torch.einsum("nd,csd->csn", x[:5], found.draws[..., :2]) + found.draws[..., 2:3]
    torch.testing.assert_close(found.probe_values, expected, rtol=0, atol=1e-12)


def test_function_values_of_classes_are_logits() -> None:
    def classes(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)

    x, _ = data()
    fields = {**FIELDS, "probe_inputs": x[:4], "mass_matrix": "identity", "thinning": 5}
    posterior = HMC(**fields).fit(classes, x, torch.arange(12) % 3, seed=0)
    assert isinstance(posterior, DrawsPosterior)
    assert posterior.probe_values is not None
    expected = x[:4] @ posterior.draws.reshape(2, 5, 2, 3)
    torch.testing.assert_close(posterior.probe_values.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", ["layer.*", ["*bias", "layer.weight"]])
def test_only_matching_sites_are_kept(keep: Any, tmp_path: Path) -> None:
    x, _ = data()
    found = fit(keep=keep, probe_inputs=x[:5], draws_on_disk=tmp_path)
    assert isinstance(found, PartialDrawsPosterior)
    assert torch.equal(found.draws, whole().draws[..., :3])
    diagnosis = found.diagnose()
    assert np.array_equal(diagnosis.rhat_weights, whole().diagnose().rhat_weights[:3])
    assert found.probe_values is not None
    assert np.array_equal(diagnosis.rhat_functions, convergence(found.probe_values.numpy()).rhat)
    sites = found.kept_sites()
    assert {k: tuple(v.shape) for k, v in sites.items()} == {"layer.weight": (2, 25, 2, 1), "layer.bias": (2, 25)}
    assert {k: tuple(v.shape) for k, v in found.sample_sites(4).items()} == {
        "layer.weight": (4, 2, 1),
        "layer.bias": (4,),
    }


def test_a_constrained_site_is_kept_in_its_own_space() -> None:
    found = fit(keep="noise")
    assert isinstance(found, PartialDrawsPosterior)
    torch.testing.assert_close(found.kept_sites()["noise"], whole().draws[..., 3].exp(), rtol=1e-12, atol=0)


def test_some_sites_become_arviz_and_are_saved(tmp_path: Path) -> None:
    x, _ = data()
    found = fit(keep="layer.*", probe_inputs=x[:5])
    for posterior in (found, _saved(found, tmp_path)):
        converted = posterior.to_arviz()
        assert set(converted.posterior.data_vars) == {"layer.weight", "layer.bias"}
        assert converted.posterior["layer.weight"].shape == (2, 25, 2, 1)
        assert converted.posterior_predictive["f"].shape == (2, 25, 5)
        assert "lp" in converted.sample_stats
        functions = posterior.to_arviz(weights=False)
        assert functions.posterior["f"].shape == (2, 25, 5)
    assert torch.equal(_saved(found, tmp_path / "again").draws, found.draws)


def _saved(posterior: DrawsPosterior, directory: Path) -> DrawsPosterior:
    posterior.save(directory)
    loaded = load(directory, model)
    assert isinstance(loaded, PartialDrawsPosterior)
    assert loaded.probe_values is not None
    return loaded


def test_some_sites_say_why_they_cannot_predict() -> None:
    found = fit(keep="layer.*")
    reasons = r"holds only the sites \['layer.weight', 'layer.bias'\], not \['noise'\], so it cannot {}; fit without"
    with pytest.raises(CapabilityError, match=reasons.format("predict")):
        found.predict(data()[0])
    with pytest.raises(CapabilityError, match=reasons.format("sample theta; .*")):
        found.sample(3)
    with pytest.raises(CapabilityError, match=reasons.format("give a mean theta")):
        _ = found.mean_theta
    with pytest.raises(CapabilityError, match=reasons.format("be the `init` of another fit")):
        NUTS(**FIELDS).fit_to(target(), init=found)
    with pytest.raises(CapabilityError, match=reasons.format("sample theta; .*")):
        found(data()[0])
    diagnosis = found.diagnose()
    assert np.isnan(diagnosis.rhat_functions).all()
    assert any("only some sites were kept; fit with `probe_inputs`" in w for w in diagnosis.warnings)


def test_keeping_all_sites_is_an_ordinary_posterior() -> None:
    assert not isinstance(fit(keep="*"), PartialDrawsPosterior)


def million(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(1_000_000), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x * weight[:10].sum(), 1.0), obs=y)


def test_a_million_weights_need_no_room_for_their_draws(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.ones(3)
    backend = HMC(
        num_samples=200,
        warmup_steps=0,
        num_chains=1,
        allow_one_chain=True,
        num_leapfrogs=1,
        step_size=0.01,
        adapt_step_size=False,
        mass_matrix="identity",
        draws_on_disk=tmp_path,
        probe_inputs=x,
        progress=False,
        compile=False,
    )
    with pytest.warns(ConvergenceWarning, match="one chain"):
        posterior = backend.fit(million, x, x)
    assert isinstance(posterior, DrawsPosterior)
    assert posterior.draws.shape == (1, 200, 1_000_000)
    assert (tmp_path / "draws.npy").stat().st_size == 128 + 200 * 4_000_000
    assert posterior.info.peak_bytes < 0.5 * 200 * 4_000_000
    assert posterior.probe_values is not None
    expected = posterior.draws[..., :10].sum(-1, keepdim=True).expand(1, 200, 3)
    torch.testing.assert_close(posterior.probe_values, expected, rtol=1e-5, atol=1e-5)
    assert posterior.predict(x, num_samples=3).mean.shape == (3,)


def test_chains_in_lock_step_record_at_once() -> None:
    starts = torch.zeros(3, 4)
    recorder = Recorder(Recording(num_samples=6, thinning=2), starts)
    for n in range(5):
        recorder.add(starts + n, {"diverging": torch.tensor([n == 0, False, n == 3]), "lp": torch.full((3,), float(n))})
    assert recorder.num_kept == 2
    assert torch.equal(recorder.draws()[..., 0], torch.tensor([[1.0, 3.0]] * 3))
    stats = recorder.stats({"diverging": torch.bool})
    assert stats["diverging"].tolist() == [[True, False], [False, False], [False, True]]
    assert stats["lp"].tolist() == [[1.0, 3.0]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_file_of_draws_grows_and_keeps_what_it_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 5, 3, generator=generator).to(dtype)
    file = DrawFile(tmp_path / "draws.npy", 2, 3, (3,), dtype)
    total = 0
    for draw in range(3):
        file.write(0, draw, values[0, draw])
        file.write(1, draw, values[1, draw])
        total = next_checksum(total, values[1, draw])
    assert torch.equal(file.read(), values[:, :3])
    file.close()
    longer = DrawFile(tmp_path / "draws.npy", 2, 5, (3,), dtype)
    for draw in (3, 4):
        longer.write(0, draw, values[0, draw])
        longer.write(1, draw, values[1, draw])
    assert torch.equal(longer.read(), values)
    assert longer.checksum(1, 3) == total
    shorter = DrawFile(tmp_path / "draws.npy", 2, 1, (3,), dtype)
    assert shorter.read().shape == (2, 5, 3)
    longer.close()


def test_a_file_of_draws_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    DrawFile(tmp_path / "draws.npy", 2, 3, (3,), torch.float32)
    with pytest.raises(ValueError, match=r"holds draws of shape \(2, 3, 3\) and type float32, expected \(2, S, 4\)"):
        DrawFile(tmp_path / "draws.npy", 2, 3, (4,), torch.float32)
    with pytest.raises(OSError, match=r"cannot keep draws in .*: it needs .* GiB, and .* GiB are free"):
        DrawFile(tmp_path / "large.npy", 1000, 10**6, (10**6,), torch.float32)
    with pytest.raises(ValueError, match="bfloat16 cannot be kept in a .npy file"):
        DrawFile(tmp_path / "other.npy", 1, 1, (1,), torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thinning": 0}, "`thinning` must be an integer >= 1, got 0"),
        ({"thinning": 26}, "`thinning` must be <= `num_samples`, or no draw is kept, got 26 > 25"),
        ({"keep": []}, "`keep` must name at least one site pattern"),
        ({"keep": ""}, "`keep` must name at least one site pattern"),
        ({"draws_on_disk": 3}, "`draws_on_disk` must be a directory or None, got 3"),
        ({"checkpoint": 3}, "`checkpoint` must be a directory or None, got 3"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be an integer >= 1"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    for sampler in (NUTS, HMC):
        with pytest.raises(ValueError, match=message):
            sampler(**{**FIELDS, **fields})


def test_what_does_not_fit_the_model_is_an_error_before_sampling() -> None:
    with pytest.raises(ValueError, match=r"`keep`: no site matches 'head.\*'; the model has \['layer.weight', "):
        fit(keep="head.*")
    with pytest.raises(ValueError, match=r"rows of shape \(3,\)"):
        fit(probe_inputs=torch.zeros(2, 3))
