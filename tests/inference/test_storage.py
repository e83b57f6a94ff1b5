"""Saving: exact, pickle-free, safe against interruptions, and with clear errors for what cannot be read."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import storage
from inference.backend import FitInfo
from inference.distributions import DenseGaussian, DiagonalGaussian, LowRankGaussian
from inference.posterior import DrawsPosterior, GaussianPosterior, MixturePosterior, Posterior
from inference.storage import FILE_NAME, load
from inference.target import Target, compile_target
from tests.cases import CASES, Case


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def target_of(name: str) -> Target:
    case = case_named(name)
    return compile_target(case.model(), case.x, case.y)


def draws(target: Target) -> DrawsPosterior:
    values = 0.3 * torch.randn(2, 5, target.dim, generator=torch.Generator().manual_seed(0))
    stats = {
        "diverging": torch.arange(10).reshape(2, 5) == 3,
        "lp": torch.rand(2, 5),
        "tree_depth": torch.ones(2, 5).long(),
    }
    info = FitInfo(3.0, 1.5, 10, [("ConvergenceWarning", "look")], {"losses": [1.0], "tensor": torch.ones(2)})
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    return DrawsPosterior(
        target, values, backend="D()", info=info, weights=weights, sample_stats=stats, log_evidence=-2.5
    )


def diagonal(target: Target) -> GaussianPosterior:
    inner = DiagonalGaussian(torch.linspace(-0.3, 0.3, target.dim), torch.full((target.dim,), 0.2))
    return GaussianPosterior(target, inner, backend="G()", linearized=True)


def low_rank(target: Target) -> GaussianPosterior:
    factor = 0.1 * torch.randn(target.dim, 2, generator=torch.Generator().manual_seed(0))
    return GaussianPosterior(
        target, LowRankGaussian(torch.zeros(target.dim), torch.ones(target.dim), factor), backend="G()"
    )


def dense(target: Target) -> GaussianPosterior:
    precision = 3.0 * torch.eye(target.dim) + 0.1
    return GaussianPosterior(target, DenseGaussian.from_precision(torch.zeros(target.dim), precision), backend="G()")


def mixture(target: Target) -> MixturePosterior:
    return MixturePosterior(
        target, [diagonal(target), low_rank(target), draws(target)], backend="M()", weights=torch.rand(3)
    )


MAKERS = [draws, diagonal, low_rank, dense, mixture]


def assert_same(found: Posterior, saved: Posterior, x: Any) -> None:
    assert type(found) is type(saved)
    assert found.info.warnings == saved.info.warnings
    assert found.log_evidence_or_none == saved.log_evidence_or_none
    own, held = saved.state()
    again, held_again = found.state()
    assert json.dumps(own) == json.dumps(again)
    assert set(held) == set(held_again)
    for name, value in held.items():
        assert torch.equal(value, held_again[name])
        assert value.dtype == held_again[name].dtype
    # The tensors are the same to the bit; a triangular solve may round differently in another memory layout.
    close = {"rtol": 1e-5, "atol": 1e-5} if saved.target.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(found.sample(4, seed=1), saved.sample(4, seed=1), **close)
    torch.testing.assert_close(found.predict(x, num_samples=5).mean, saved.predict(x, num_samples=5).mean, **close)


@pytest.mark.parametrize("maker", MAKERS)
def test_every_kind_comes_back_exactly_and_the_saved_one_still_works(maker: Any, tmp_path: Path) -> None:
    case, posterior = case_named("by_hand"), maker(target_of("by_hand"))
    before = posterior.predict(case.x, num_samples=5).mean
    posterior.save(tmp_path / "run")
    assert torch.equal(before, posterior.predict(case.x, num_samples=5).mean)
    found = load(tmp_path / "run", case.model())
    assert_same(found, posterior, case.x)
    assert found.backend_name == posterior.backend_name
    assert repr(found.backend) == repr(posterior.backend)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("name", [c.name for c in CASES if c.name not in {"subsampling", "subsampling_by_index"}])
def test_every_model_comes_back(name: str, tmp_path: Path) -> None:
    case, posterior = case_named(name), draws(target_of(name))
    posterior.save(tmp_path)
    assert_same(load(tmp_path, case.model()), posterior, case.x)


def test_a_restricted_and_tempered_posterior_comes_back(tmp_path: Path) -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    small = target.restrict(["w2", "b2"], torch.linspace(-1, 1, target.dim)).tempered(2.0, 3.0)
    posterior = diagonal(small)
    posterior.save(tmp_path)
    found = load(tmp_path, case.model())
    assert_same(found, posterior, case.x)
    theta = torch.randn(small.dim)
    assert torch.equal(found.target.log_density(theta), small.log_density(theta))
    assert [s.name for s in found.target.sites] == ["w2", "b2"]


def odd_names(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("w[0]", dist.Normal(0.0, 1.0))
    b = pyro.sample("w[1]*", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b * x[:, 0], 1.0), obs=y)


def test_site_names_with_brackets_are_not_taken_for_patterns(tmp_path: Path) -> None:
    x = torch.randn(5, 1)
    target = compile_target(odd_names, x, x[:, 0]).restrict("*0*", torch.zeros(2))
    diagonal(target).save(tmp_path)
    assert [s.name for s in load(tmp_path, odd_names).target.sites] == ["w[0]"]


def nested(x: Any, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    a, b = x["pair"]
    with pyro.plate("data", len(a)):
        pyro.sample("y", dist.Normal(w * a + b + x["z"], 1.0), obs=y)


def test_nested_inputs_come_back(tmp_path: Path) -> None:
    x = {"pair": (torch.randn(4), torch.randn(4)), "z": torch.randn(4)}
    posterior = draws(compile_target(nested, x, torch.randn(4)))
    posterior.save(tmp_path)
    found = load(tmp_path, nested)
    assert isinstance(found.target.x["pair"], tuple)
    assert torch.equal(found.target.x["pair"][1], x["pair"][1])
    assert_same(found, posterior, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_come_back_whatever_the_default(dtype: torch.dtype, tmp_path: Path) -> None:
    case = case_named("by_hand")
    x, y = case.x.to(dtype), case.y.to(dtype)
    torch.set_default_dtype(dtype)
    posterior = diagonal(compile_target(case.model(), x, y))
    posterior.save(tmp_path)
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    assert_same(load(tmp_path, case.model()), posterior, x)


def test_a_loaded_posterior_diagnoses_and_converts_like_the_saved_one(tmp_path: Path) -> None:
    class Sampler:
        capabilities = frozenset({"chains"})
        max_tree_depth = 1

    target = target_of("by_hand")
    values = torch.randn(2, 8, target.dim)
    posterior = DrawsPosterior(target, values, backend=Sampler(), sample_stats={"tree_depth": torch.ones(2, 8).long()})
    posterior.save(tmp_path)
    found = load(tmp_path, case_named("by_hand").model())
    a, b = posterior.diagnose(), found.diagnose()
    assert b.backend == "Sampler"
    assert b.depth_saturated == a.depth_saturated == 1.0
    assert a.summary() == b.summary()
    assert a.warnings == b.warnings
    assert found.to_arviz().posterior.sizes == posterior.to_arviz().posterior.sizes


def test_data_can_be_left_out_and_are_then_asked_for(tmp_path: Path) -> None:
    case, posterior = case_named("by_hand"), draws(target_of("by_hand"))
    posterior.save(tmp_path, data=False)
    assert not [k for k in load_file(tmp_path / FILE_NAME) if k.startswith("data.")]
    with pytest.raises(ValueError, match="without its training data"):
        load(tmp_path, case.model())
    assert_same(load(tmp_path, case.model(), case.x, case.y), posterior, case.x)
    with pytest.raises(ValueError, match="fitted to 12 data, got 6"):
        load(tmp_path, case.model(), case.x[:6], case.y[:6])
    with pytest.raises(ValueError, match="log density at its mean"):
        load(tmp_path, case.model(), case.x, case.y + 3)
    with pytest.raises(ValueError, match=r"fitted in torch\.float64"):
        load(tmp_path, case.model(), case.x.float(), case.y.float())


def test_an_existing_run_is_only_replaced_when_asked(tmp_path: Path) -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    draws(target).save(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        dense(target).save(tmp_path)
    assert isinstance(load(tmp_path, case.model()), DrawsPosterior)
    dense(target).save(tmp_path, overwrite=True)
    assert isinstance(load(tmp_path, case.model()), GaussianPosterior)


def test_missing_truncated_foreign_and_corrupt_files_are_told_apart(tmp_path: Path) -> None:
    model = case_named("by_hand").model()
    with pytest.raises(FileNotFoundError, match="no posterior in"):
        load(tmp_path / "nowhere", model)
    file = tmp_path / FILE_NAME
    draws(target_of("by_hand")).save(tmp_path)
    whole = file.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load(tmp_path, model)
    file.write_bytes(b"PK" + os.urandom(500))
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path, model)
    save_file({"a": torch.ones(2)}, str(file))
    with pytest.raises(ValueError, match="not a posterior saved by this library"):
        load(tmp_path, model)
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="checksum"):
        load(tmp_path, model)
    place = whole.index(b"look")
    file.write_bytes(whole[:place] + b"book" + whole[place + 4 :])
    with pytest.raises(ValueError, match="checksum"):
        load(tmp_path, model)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FORMAT_VERSION", 99)
    draws(target_of("by_hand")).save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 99"):
        load(tmp_path, case_named("by_hand").model())


def wider_prior(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean.expand(len(x)), 0.5), obs=y)


def positive_mean(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.HalfNormal(3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean.expand(len(x)), 0.5), obs=y)


def other_inputs(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([7]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_the_wrong_model_is_refused_by_the_first_difference(tmp_path: Path) -> None:
    draws(target_of("one_number")).save(tmp_path)
    with pytest.raises(ValueError, match="site 'mean' where this model has 'w'"):
        load(tmp_path, case_named("plated_weights").model())
    with pytest.raises(ValueError, match="log density at its mean"):
        load(tmp_path, wider_prior)
    with pytest.raises(ValueError, match="has the support"):
        load(tmp_path, positive_mean)
    with pytest.raises(ValueError, match="does not run on its data"):
        load(tmp_path, other_inputs)
    draws(target_of("plated_weights")).save(tmp_path / "b")
    with pytest.raises(ValueError, match="'w' .* in the model|2 sites|has 1 sites"):
        load(tmp_path / "b", case_named("positive_scale").model())
    with pytest.raises(ValueError, match=r"shape \(3,\) in .* but \(3, 3\)"):
        load(
            tmp_path / "b", lambda x, y=None: case_named("categorical").model()(x, None if y is None else y.long() * 0)
        )


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_while_saving_leaves_the_old_posterior(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    draws(target).save(tmp_path)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left on device.*unchanged"):
        dense(target).save(tmp_path, overwrite=True)
    monkeypatch.undo()
    assert isinstance(load(tmp_path, case.model()), DrawsPosterior)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_a_file_that_cannot_grow_leaves_the_old_posterior(tmp_path: Path) -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    dense(target).save(tmp_path)
    large = DrawsPosterior(target, torch.randn(1, 20_000, target.dim), backend="D()")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write"):
            large.save(tmp_path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(load(tmp_path, case.model()), GaussianPosterior)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


_SAVER = """
import sys, torch
torch.set_default_dtype(torch.float64)
from inference.posterior import DrawsPosterior
from inference.target import compile_target
from tests.cases import CASES
case = next(c for c in CASES if c.name == "by_hand")
target = compile_target(case.model(), case.x, case.y)
posterior = DrawsPosterior(target, torch.randn(1, 2_000_000, target.dim), backend="D()")
print("saving", flush=True)
posterior.save(sys.argv[1], overwrite=True)
"""


def test_a_process_killed_while_saving_leaves_the_old_posterior_and_its_rubbish_is_removed(tmp_path: Path) -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    dense(target).save(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", _SAVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    pattern = f".{FILE_NAME}.*"
    while process.poll() is None and not any(p.stat().st_size > 1e6 for p in tmp_path.glob(pattern)):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert list(tmp_path.glob(pattern))
    assert isinstance(load(tmp_path, case.model()), GaussianPosterior)
    draws(target).save(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_nothing_here_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    draws(target_of("by_hand")).save(tmp_path)
    load(tmp_path, case_named("by_hand").model())
    assert b"__reduce__" not in (tmp_path / FILE_NAME).read_bytes()
