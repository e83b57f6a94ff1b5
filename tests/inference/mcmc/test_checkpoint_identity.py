from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inference.mcmc import HMC, NUTS, checkpoint
from tests.inference.mcmc.sampling import data
from tests.inference.mcmc.test_checkpoint import FIELDS, fit, linear, stop_after


def other_prior(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.001).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight + bias, 0.5), obs=y)


def other_sites(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_default_dtype(torch.float64)
    directory = tmp_path_factory.mktemp("finished")
    fit(NUTS, directory)
    return directory


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 1, AssertionError)


@pytest.mark.usefixtures("no_sampling")
def test_a_checkpoint_of_another_model_is_refused(finished: Path) -> None:
    backend = NUTS(**{**FIELDS, "checkpoint": finished, "num_samples": 90})
    with pytest.raises(ValueError, match=r"another model: the log density at its first point was .* prior"):
        backend.fit(other_prior, *data(), seed=1)
    with pytest.raises(ValueError, match=r"another model: it has the site 'bias' of shape \(\) .* has \(none\)"):
        backend.fit(other_sites, *data(), seed=1)


@pytest.mark.usefixtures("no_sampling")
def test_a_checkpoint_of_other_data_is_refused(finished: Path) -> None:
    backend = NUTS(**{**FIELDS, "checkpoint": finished, "num_samples": 90})
    x, y = data()
    with pytest.raises(ValueError, match=r"other data \(12 rows .* 11 of"):
        backend.fit(linear, x[:11], y[:11], seed=1)
    y[3] += 1e-12
    with pytest.raises(ValueError, match="other data .* or other values"):
        backend.fit(linear, x, y, seed=1)


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "written with seed 2, got 3"),
        ({"init": torch.zeros(3, dtype=torch.float64)}, "started elsewhere: pass the same `init`"),
        ({"warmup_steps": 41}, "written with `warmup_steps`=40, got 41: only chains_per_block, .* may change"),
        ({"num_chains": 3}, "`num_chains`=4, got 3"),
        ({"temperature": 2.0}, "`temperature`=1.0, got 2.0"),
        ({"max_tree_depth": 5}, "`max_tree_depth`=10, got 5"),
        ({"thinning": 1}, "`thinning`=3, got 1"),
        ({"mass_matrix": "dense"}, "`mass_matrix`='diagonal', got 'dense'"),
        ({"probe_inputs": torch.zeros(1, 2, dtype=torch.float64)}, "other probe inputs"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(finished: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(NUTS, finished, **{"num_samples": 90, **changes})


@pytest.mark.usefixtures("no_sampling")
def test_a_checkpoint_of_another_backend_or_version_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is one of NUTS, not HMC"):
        fit(HMC, finished)
    monkeypatch.setattr(checkpoint, "_version", lambda name: "99.0")
    with pytest.raises(ValueError, match=r"written with bnn-zoo .*, this is 99.0: the draws would differ"):
        fit(NUTS, finished)


def copied(source: Path, to: Path) -> Path:
    to.mkdir()
    for file in source.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("name", ["run.safetensors", "chain-0002.safetensors"])
def test_a_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path, name: str) -> None:
    cut, changed = copied(finished, tmp_path / "cut"), copied(finished, tmp_path / "changed")
    whole = (cut / name).read_bytes()
    (cut / name).write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="truncated"):
        fit(NUTS, cut)
    with safe_open(str(changed / name), framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    tensors[min(tensors)] += 1
    save_file(tensors, str(changed / name), metadata=metadata)
    with pytest.raises(ValueError, match="corrupt: it does not match its checksum"):
        fit(NUTS, changed)
    (cut / name).write_bytes(b"")
    with pytest.raises(ValueError, match="not readable"):
        fit(NUTS, cut)


@pytest.mark.usefixtures("no_sampling")
def test_changed_or_missing_draws_are_refused(finished: Path, tmp_path: Path) -> None:
    changed, missing = copied(finished, tmp_path / "changed"), copied(finished, tmp_path / "missing")
    content = bytearray((changed / "draws.npy").read_bytes())
    content[-1] ^= 1
    (changed / "draws.npy").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"does not hold the 20 draws of chain 3"):
        fit(NUTS, changed)
    (missing / "draws.npy").unlink()
    with pytest.raises(ValueError, match=r"does not hold the 20 draws of chain 0"):
        fit(NUTS, missing)
    (missing / "draws.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"not a readable .npy file"):
        fit(NUTS, missing)


@pytest.mark.usefixtures("no_sampling")
def test_a_compiled_checkpoint_needs_a_compiler(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(finished, tmp_path / "run")
    monkeypatch.setattr(checkpoint.Checkpoint, "read", _pretend_compiled(checkpoint.Checkpoint.read))
    monkeypatch.setattr("inference.graph.compiler_available", lambda: False)
    with pytest.raises(ValueError, match=r"written by a compiled program, but there is no C\+\+ compiler"):
        fit(NUTS, directory)


def _pretend_compiled(original: Any) -> Any:
    def read(self: checkpoint.Checkpoint, numbers: Any) -> Any:
        found = original(self, numbers)
        self.compiled = True
        return found

    return read


@pytest.mark.usefixtures("no_sampling")
def test_another_number_of_threads_warns(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match="with 1 threads and goes on with 7: draws from here on may differ"):
        fit(NUTS, finished)


def test_an_unwritable_directory_is_an_error_before_sampling(tmp_path: Path, no_sampling: None) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for name in ("checkpoint", "draws_on_disk"):
        with pytest.raises(ValueError, match=f"`{name}` must be a directory, but .* is a file"):
            NUTS(**{name: file})
        with pytest.raises(OSError, match="could not write|cannot keep draws"):
            NUTS(**{**FIELDS, name: file / "below"}).fit(linear, *data())


def test_draws_of_an_earlier_fit_are_not_written_over(finished: Path, tmp_path: Path, no_sampling: None) -> None:
    directory = copied(finished, tmp_path / "run")
    (directory / "run.safetensors").unlink()
    with pytest.raises(FileExistsError, match="holds the draws of an earlier fit"):
        fit(NUTS, directory)
    with pytest.raises(FileExistsError, match="choose another directory"):
        fit(NUTS, None, draws_on_disk=directory)
