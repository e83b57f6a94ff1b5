"""Peers and where they run, and what is recorded about the machine.

Pyro and ArviZ are dependencies of bnn-zoo and run in its own pinned environment. Any other peer gets an environment
under `benchmarks/.envs/`, made when first asked for from the table below, within `constraints.txt`; it runs as a
process that waits for orders, so that it is timed in turn with everyone else. To add one: a line in `PEERS`, and a
script in `benchmarks/peers/` that answers like `numpyro_peer.py`.
"""

from __future__ import annotations

import atexit
import json
import platform
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
ENVIRONMENTS = HERE / ".envs"
CONSTRAINTS = HERE.parent / "constraints.txt"
PACKAGES = ("bnn-zoo", "torch", "pyro-ppl", "arviz", "numpy", "scipy")


class PeerError(RuntimeError):
    """A peer that could not be installed or started; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A peer and what it needs.

    Attributes:
        requirements: What its environment installs; none for what bnn-zoo's own environment has already.
        script: Its script in `benchmarks/peers/`.
        alone: What is installed without its own requirements.
    """

    requirements: tuple[str, ...] = ()
    script: str = ""
    alone: tuple[str, ...] = ()


PEERS = {
    "pyro": Peer(),
    "arviz": Peer(),
    "numpyro": Peer(("numpyro==0.22.0", "jax==0.10.2", "jaxlib==0.10.2"), "numpyro_peer.py"),
    "blackjax": Peer(("blackjax==1.7.1", "jax==0.10.2", "jaxlib==0.10.2"), "blackjax_sampler.py"),
    # torchvision, which BackPACK asks for and nothing here imports, would bring a torch for graphics cards along.
    "laplace-torch": Peer(
        (
            "torch",
            "numpy",
            "scipy",
            "einops==0.8.2",
            "opt_einsum==3.4.0",
            "tqdm",
            "torchmetrics==1.9.0",
            "tensordict==0.15.3",
        ),
        "laplace_torch_peer.py",
        (
            *("laplace-torch==0.3", "backpack-for-pytorch==1.7.1", "curvlinops-for-pytorch==3.0.1"),
            *("asdl==0.1.5", "asdfghjkl==0.1a5", "linear_operator==0.6.1", "einconv==0.1.0", "unfoldNd==0.2.3"),
        ),
    ),
}


def python_of(peer: str) -> Path:
    """Interpreter of a peer's environment, made if it is not there or its requirements have changed.

    Args:
        peer: A key of `PEERS`.

    Returns:
        Path of the interpreter.

    Raises:
        PeerError: If the installation fails.
    """
    found = PEERS[peer]
    if not found.requirements:
        return Path(sys.executable)
    folder = ENVIRONMENTS / peer
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join((*found.requirements, *found.alone))
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making an environment for {peer}: {wanted.replace(chr(10), ', ')}", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS]
    for packages in (found.requirements, ("--no-deps", *found.alone) if found.alone else ()):
        if not packages:
            continue
        done = subprocess.run([str(p) for p in (*command, *packages)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise PeerError(f"installing {', '.join(packages)} failed: {lines[-1] if lines else 'no network?'}")
    stamp.write_text(wanted)
    return python


class PeerProcess:
    """A peer waiting in a process of its own.

    Attributes:
        build_seconds: Its first call, compilation included.
        result: What it computed, to be compared with ours.
        versions: Its packages.
    """

    def __init__(self, peer: str, task: str, arrays: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "problem.npz"
        np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
        script = HERE / "peers" / PEERS[peer].script
        self._process = subprocess.Popen(
            [str(python_of(peer)), str(script), task, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)
        ready = self._answer()
        self.build_seconds: float = ready["build_seconds"]
        self.result: list[float] = ready["result"]
        self.versions: dict[str, str] = ready["versions"]
        note_versions(self.versions)

    def seconds(self, calls: int) -> float:
        """Let it make some calls; seconds for all of them, by its own clock."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            error = self._process.stderr.read().strip().splitlines() if self._process.stderr else []
            raise PeerError(f"the peer stopped: {error[-1] if error else 'no message'}")
        return json.loads(line)


_seen: dict[str, dict[str, str]] = {}


def note_versions(versions: dict[str, str]) -> None:
    """Remember the packages of a peer for :func:`record`."""
    _seen.setdefault("versions", {}).update(versions)


def start(peer: str, task: str, **arrays: Any) -> PeerProcess:
    """Start a peer on a task.

    Args:
        peer: A key of `PEERS`.
        task: A task its script knows.
        **arrays: The problem, as arrays.

    Returns:
        The process, warmed up.
    """
    return PeerProcess(peer, task, arrays)


def record() -> dict[str, Any]:
    """Versions, processor and threads; nothing that names the machine or its user."""
    return {
        "versions": {name: _version(name) for name in PACKAGES} | _seen.get("versions", {}),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    """Model name of the processor where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
