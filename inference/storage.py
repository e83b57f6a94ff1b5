"""Save and load posteriors: one safetensors file, its JSON header the record of the fit; never a pickle."""

from __future__ import annotations

import glob
import math
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.backend import FitInfo
from inference.container import read_file, write_file
from inference.errors import UnsupportedModelError
from inference.linearised_draws import LinearisedDrawsPosterior
from inference.partial import PartialDrawsPosterior
from inference.posterior import POSTERIORS, Posterior
from inference.restriction import restrict_to_entries
from inference.target import Target, compile_target

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
        max_tree_depth: That of NUTS, for diagnosing its draws.
        target_accept: What warm-up aimed at, likewise; None where nothing was adapted.
    """

    name: str
    text: str
    capabilities: frozenset[str]
    max_tree_depth: int | None = None
    target_accept: float | None = None

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
        raise FileExistsError(
            f"{path} holds a posterior already; pass overwrite=True to replace it, or choose another directory"
        )
    path.mkdir(parents=True, exist_ok=True)
    figures, tensors = posterior.state()
    tensors = {f"posterior.{k}": v for k, v in tensors.items()}
    target = posterior.target
    if target.at is not None:
        tensors["target.at"] = target.at
    if target.entries is not None:
        tensors["target.entries"] = target.entries
    record = _record(posterior, figures)
    if data:
        record["x_structure"], leaves = _flatten(target.x)
        tensors.update({**leaves, "data.y": target.y})
    write_file(file, record, tensors)


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
        x, y = _unflatten(record["x_structure"], tensors), tensors["data.y"]
    target = _compile(model, x, y, record, path)
    if "target.entries" in tensors:
        target = restrict_to_entries(target, tensors["target.entries"], tensors["target.at"])
    elif "target.at" in tensors:
        # Names are literal here, also those with brackets.
        target = target.restrict([glob.escape(name) for name in record["free_sites"]], tensors["target.at"])
    target = target.tempered(record["temperature"], record["likelihood_temperature"])
    held = {k.removeprefix("posterior."): v for k, v in tensors.items() if k.startswith("posterior.")}
    saved = record["backend"]
    backend = SavedBackend(
        saved["name"],
        saved["repr"],
        frozenset(saved["capabilities"]),
        saved["max_tree_depth"],
        saved.get("target_accept"),
    )
    info = FitInfo(**{**record["info"], "warnings": [tuple(w) for w in record["info"]["warnings"]]})
    others = (PartialDrawsPosterior, LinearisedDrawsPosterior)
    kind = {**POSTERIORS, **{cls.__name__: cls for cls in others}}[record["class"]]
    posterior = kind.from_state(
        target, record["figures"], held, backend=backend, info=info, log_evidence=record["log_evidence"]
    )
    _check_density(record["log_density"], _log_density(posterior), path)
    return posterior


def _compile(model: Any, x: Any, y: Any, record: dict[str, Any], path: Any) -> Target:
    """Tie the model to the data, and see that it is the one that was saved."""
    try:
        target = compile_target(model, x, y)
    except UnsupportedModelError:
        raise
    except (RuntimeError, IndexError) as error:  # a matrix product that does not fit, say
        raise ValueError(f"{path} belongs to another model: this one does not run on its data ({error})") from error
    _check_sites(record["sites"], _sites(target), path)
    if target.num_data != record["num_data"]:
        raise ValueError(
            f"{path} was fitted to {record['num_data']} data, got {target.num_data}; pass the same training data"
        )
    if str(target.dtype) != record["dtype"]:
        raise ValueError(f"{path} was fitted in {record['dtype']}, but the data are {target.dtype}; convert them first")
    return target


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
        raise FileNotFoundError(
            f"no posterior in {path}: expected a file {FILE_NAME}, as written by posterior.save(path)"
        )
    return read_file(file, "posterior", FORMAT, FORMAT_VERSION)


def _record(posterior: Posterior, figures: dict[str, Any]) -> dict[str, Any]:
    target, backend = posterior.target, posterior.backend
    inner = getattr(backend, "backend", backend)  # what a Subset wraps
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": type(posterior).__name__,
        "figures": figures,
        "backend": {
            "name": posterior.backend_name,
            "repr": repr(backend),
            "capabilities": sorted(getattr(backend, "capabilities", ())),
            "max_tree_depth": getattr(inner, "max_tree_depth", None),
            "target_accept": getattr(inner, "target_accept", None) if getattr(inner, "adapt_step_size", True) else None,
        },
        "sites": _sites(target),
        "free_sites": [s.name for s in target.sites],
        "temperature": target.temperature,
        "likelihood_temperature": target.likelihood_temperature,
        "dtype": str(target.dtype),
        "num_data": target.num_data,
        "log_evidence": posterior.log_evidence_or_none,
        "log_density": _log_density(posterior),
        "info": asdict(posterior.info),
        "versions": {"bnn-zoo": _version("bnn-zoo"), "torch": torch.__version__, "pyro-ppl": _version("pyro-ppl")},
    }


def _sites(target: Target) -> list[list[Any]]:
    return [[s.name, list(s.shape), str(s.support)] for s in target.all_sites]


def _check_sites(saved: list[Any], own: list[Any], path: Any) -> None:
    for (name, shape, support), (mine, my_shape, my_support) in zip(saved, own, strict=False):
        if name != mine:
            raise ValueError(f"{path} belongs to another model: it has site {name!r} where this model has {mine!r}")
        if shape != my_shape:
            raise ValueError(f"site {name!r} has shape {tuple(shape)} in {path} but {tuple(my_shape)} in the model")
        if support != my_support:
            raise ValueError(f"site {name!r} has the support {support} in {path} but {my_support} in the model")
    if len(saved) != len(own):
        odd = max(saved, own, key=len)[min(len(saved), len(own))][0]
        raise ValueError(
            f"{path} belongs to another model: it has {len(saved)} sites, this model {len(own)}; first "
            f"difference: {odd!r}"
        )


def _log_density(posterior: Posterior) -> float | None:
    """Model density at the posterior mean, which tells apart models whose sites look alike; None if not known."""
    if not posterior.complete:
        return None
    with torch.no_grad():
        value = float(posterior.target.log_density(posterior.mean_theta))
    return value if math.isfinite(value) else None


def _check_density(saved: float | None, own: float | None, path: Any) -> None:
    if saved is None or own is None:
        return
    if abs(saved - own) > 1e-3 * (1 + abs(saved)):
        raise ValueError(
            f"{path} belongs to another model: the log density at its mean was {saved:.6g} nats when saved and "
            f"is {own:.6g} with this model and data; a prior, the likelihood, a constant or the training data differ"
        )


def _flatten(x: Any, at: str = "data.x") -> tuple[Any, dict[str, Tensor]]:
    """Structure of the inputs for JSON, and their tensors by name."""
    if isinstance(x, Tensor):
        return at, {at: x}
    pairs = list(x.items()) if isinstance(x, dict) else list(enumerate(x))
    parts = [_flatten(value, f"{at}.{i}") for i, (_, value) in enumerate(pairs)]
    structure = {"keys": [k for k, _ in pairs] if isinstance(x, dict) else None, "values": [p[0] for p in parts]}
    return structure, {name: leaf for p in parts for name, leaf in p[1].items()}


def _unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(structure, str):
        return tensors[structure]
    values = [_unflatten(s, tensors) for s in structure["values"]]
    return tuple(values) if structure["keys"] is None else dict(zip(structure["keys"], values, strict=True))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
