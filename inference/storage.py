"""Save and load posteriors: one safetensors file, its JSON header the record of the fit; never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from inference.backend import FitInfo
from inference.posterior import POSTERIORS, Posterior
from inference.target import compile_target

FORMAT = "bnn-zoo posterior"
FORMAT_VERSION = 1
FILE_NAME = "posterior.safetensors"


@dataclass(frozen=True, repr=False)
class SavedBackend:
    """Record of the backend that made a loaded posterior.

    Attributes:
        name: Class name.
        text: Its ``repr``, which re-creates it.
        capabilities: What its class could do.
    """

    name: str
    text: str
    capabilities: frozenset[str]

    def __repr__(self) -> str:
        return self.text


def save(posterior: Posterior, path: Path, *, overwrite: bool = False, data: bool = True) -> None:
    """Write a posterior to a directory.

    The file is written beside the final one and moved into place, so an interruption leaves the old one readable.

    Args:
        posterior: What to save; it is not changed.
        path: Directory, made if missing.
        overwrite: Allow replacing a posterior that is there already.
        data: Also store the training data.

    Raises:
        FileExistsError: If there is one already and ``overwrite`` is False.
        OSError: If the file cannot be written (a full disk, say); an older one stays as it was.
    """
    file = path / FILE_NAME
    if file.exists() and not overwrite:
        raise FileExistsError(f"{path} holds a posterior already; pass overwrite=True to replace it, or choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    figures, tensors = posterior.state()
    tensors = {f"posterior.{k}": v for k, v in tensors.items()}
    target = posterior.target
    if target.at is not None:
        tensors["target.at"] = target.at
    record = _record(posterior, figures)
    if data:
        leaves, record["x_structure"] = _flatten(target.x)
        tensors.update({f"data.x.{i}": leaf for i, leaf in enumerate(leaves)})
        tensors["data.y"] = target.y
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    record["sha256"] = _digest(plain)
    temporary = path / f".{FILE_NAME}.{os.getpid()}"
    try:
        save_file(plain, str(temporary), metadata={"record": json.dumps(record)})
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {file}: {error}; an older posterior there is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, model: Any, x: Any = None, y: Any = None) -> Posterior:
    """Read a posterior back and tie it to its model.

    Args:
        path: Directory it was saved to.
        model: The same Pyro model.
        x: Training inputs, only if they were left out of the file.
        y: Training targets, likewise.

    Returns:
        A posterior that predicts, samples and diagnoses as the saved one.

    Raises:
        FileNotFoundError: If there is no posterior.
        ValueError: If the file is truncated, foreign, corrupt, or belongs to another model.
    """
    record, tensors = read(Path(path))
    if x is None:
        if "data.y" not in tensors:
            raise ValueError(f"{path} was saved without its training data; pass them: load(path, model, x, y)")
        leaves = [tensors[f"data.x.{i}"] for i in range(sum(k.startswith("data.x.") for k in tensors))]
        x, y = _unflatten(leaves, record["x_structure"]), tensors["data.y"]
    target = compile_target(model, x, y)
    _check_sites(record["sites"], [(s.name, list(s.shape)) for s in target.all_sites], path)
    if "target.at" in tensors:
        target = target.restrict(record["free_sites"], tensors["target.at"])
    target = target.tempered(record["temperature"], record["likelihood_temperature"])
    held = {k.removeprefix("posterior."): v for k, v in tensors.items() if k.startswith("posterior.")}
    saved = record["backend"]
    backend = SavedBackend(saved["name"], saved["repr"], frozenset(saved["capabilities"]))
    info = FitInfo(**{**record["info"], "warnings": [tuple(w) for w in record["info"]["warnings"]]})
    kind = POSTERIORS[record["class"]]
    return kind.from_state(target, record["figures"], held, backend=backend, info=info, log_evidence=record["log_evidence"])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a file without a model.

    Args:
        path: Directory.

    Returns:
        The record and the tensors.

    Raises:
        FileNotFoundError: If there is no posterior.
        ValueError: If the file is truncated, foreign or corrupt.
    """
    file = path / FILE_NAME
    if not file.exists():
        raise FileNotFoundError(f"no posterior in {path}: expected a file {FILE_NAME}, as written by posterior.save(path)")
    try:
        with safe_open(str(file), framework="pt") as handle:
            record = json.loads((handle.metadata() or {}).get("record", "null"))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable ({error}): it is truncated or not a safetensors file; save again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{file} is a safetensors file, but not a posterior saved by this library")
    if record["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{file} has format version {record['format_version']}, this library reads up to {FORMAT_VERSION}; update")
    if record["sha256"] != _digest(tensors):
        raise ValueError(f"{file} is corrupt: its tensors do not match their checksum; save again")
    return record, tensors


def _record(posterior: Posterior, figures: dict[str, Any]) -> dict[str, Any]:
    target, backend = posterior.target, posterior.backend
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": type(posterior).__name__,
        "figures": figures,
        "backend": {
            "name": getattr(backend, "name", type(backend).__name__),
            "repr": repr(backend),
            "capabilities": sorted(getattr(backend, "capabilities", ())),
        },
        "sites": [(s.name, list(s.shape)) for s in target.all_sites],
        "free_sites": [s.name for s in target.sites],
        "temperature": target.temperature,
        "likelihood_temperature": target.likelihood_temperature,
        "dtype": str(target.dtype),
        "num_data": target.num_data,
        "log_evidence": posterior.log_evidence_or_none,
        "info": asdict(posterior.info),
        "versions": {"bnn-zoo": _version("bnn-zoo"), "torch": torch.__version__, "pyro-ppl": _version("pyro-ppl")},
    }


def _check_sites(saved: list[Any], own: list[tuple[str, list[int]]], path: Any) -> None:
    for (name, shape), (mine, my_shape) in zip(saved, own, strict=False):
        if name != mine:
            raise ValueError(f"{path} belongs to another model: it has site {name!r} where this model has {mine!r}")
        if list(shape) != list(my_shape):
            raise ValueError(f"site {name!r} has shape {tuple(shape)} in {path} but {tuple(my_shape)} in the model")
    if len(saved) != len(own):
        longer = saved if len(saved) > len(own) else own
        raise ValueError(f"{path} has {len(saved)} sites but the model {len(own)}; first difference: {longer[min(len(saved), len(own))][0]!r}")


def _flatten(x: Any) -> tuple[list[Tensor], Any]:
    if isinstance(x, Tensor):
        return [x], "tensor"
    if isinstance(x, dict):
        return list(x.values()), list(x)
    return pytree.tree_leaves(x), len(x)


def _unflatten(leaves: list[Tensor], structure: Any) -> Any:
    if structure == "tensor":
        return leaves[0]
    if isinstance(structure, list):
        return dict(zip(structure, leaves, strict=True))
    return tuple(leaves)


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy() if tensors[name].numel() else b"")
    return total.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
