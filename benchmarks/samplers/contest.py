"""Contestants as processes of their own, and what is computed from the draws that each hands back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environments
from benchmarks.environments import PeerError
from benchmarks.samplers.posteriors import Posterior
from inference.diagnostics import ess_bulk, rhat, standard_errors

ROOT = Path(__file__).parent.parent.parent
PEERS = {"NumPyro NUTS": "numpyro", "BlackJAX NUTS": "blackjax", "BlackJAX MCLMC": "blackjax"}


@dataclass(frozen=True)
class Contestant:
    """A sampler with its settings.

    Attributes:
        label: What the table calls it.
        sampler: One of our classes, "Pyro NUTS", or a key of `PEERS`.
        options: num_chains, num_samples, warmup_steps and what else it takes.
        fits: Fits with seeds 0, 1, ...; the first is the first of its process.
    """

    label: str
    sampler: str
    options: dict[str, Any] = field(default_factory=dict)
    fits: int = 3


class Process:
    """A contestant waiting for orders.

    Args:
        contestant: Who.
        name: Key of the posterior in `POSTERIORS`.
        posterior: What to sample.
        threads: Threads it may use.
    """

    def __init__(self, contestant: Contestant, name: str, posterior: Posterior, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        np.savez(folder / "arrays.npz", **posterior.arrays)
        specification = {
            "sampler": contestant.sampler,
            "options": contestant.options,
            "posterior": name,
            "kind": posterior.kind,
            "arrays": str(folder / "arrays.npz"),
            "threads": threads,
        }
        (folder / "specification.json").write_text(json.dumps(specification))
        peer = PEERS.get(contestant.sampler)
        if peer is None:
            command = [sys.executable, "-m", "benchmarks.samplers.own"]
        else:
            command = [str(environments.python_of(peer)), str(ROOT / "benchmarks" / "peers" / f"{peer}_sampler.py")]
        self._errors = (folder / "errors.txt").open("w")
        self._process = subprocess.Popen(
            [*command, str(folder / "specification.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )
        environments.note_versions(self._answer()["versions"])

    def fit(self, seed: int) -> dict[str, Any]:
        """One fit: its costs, and "values", the judged functions at its draws, (C, S, F)."""
        path = Path(self._folder.name) / "values.npy"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"seed": seed, "path": str(path)}) + "\n")
        self._process.stdin.flush()
        return self._answer() | {"values": np.load(path)}

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            errors = (Path(self._folder.name) / "errors.txt").read_text().strip().splitlines()
            raise PeerError(f"the contestant stopped: {errors[-1] if errors else 'no message'}")
        return json.loads(line)


def judge(answer: dict[str, Any]) -> dict[str, Any]:
    """Figures of one fit.

    Args:
        answer: Of :meth:`Process.fit`.

    Returns:
        Seconds, gradients, effective draws and their rates, R-hat; means and standard deviations of the functions and
        their Monte-Carlo standard errors.
    """
    values = answer["values"]
    ess = float(np.median(ess_bulk(values)))
    errors = standard_errors(values)
    if len(values) == 1:  # the halves of one chain
        values = np.stack(np.split(values[0, : values.shape[1] // 2 * 2], 2))
    return {
        "seconds": answer["seconds"],
        "sampling_seconds": answer["sampling_seconds"],
        "gradients": answer["gradients"],
        "divergences": answer["divergences"],
        "us_per_gradient": 1e6 * answer["sampling_seconds"] / answer["gradients"] if answer["gradients"] else None,
        "ess": ess,
        "ess_per_second": ess / answer["sampling_seconds"],
        "ess_per_second_whole": ess / answer["seconds"],
        "ess_per_gradient": ess / answer["gradients"] if answer["gradients"] else None,
        "rhat": float(np.quantile(rhat(values), 0.95)),
        "mean": values.mean((0, 1)).tolist(),
        "sd": values.std((0, 1)).tolist(),
        "mean_error": errors.mean.tolist(),
        "sd_error": errors.sd.tolist(),
    }
