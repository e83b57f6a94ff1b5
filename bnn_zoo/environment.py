"""With what a result was computed: versions, device, threads; nothing that names the machine or its user."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("bnn-zoo", "torch", "pyro-ppl", "arviz", "numpy", "scipy")


def environment(threads: int) -> dict[str, Any]:
    """What a results file records.

    Args:
        threads: CPU threads of every fit.

    Returns:
        Versions by package, system, processor architecture and cores, device, threads.
    """
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": "cpu",
        "threads": threads,
        "dtype": str(torch.float32).removeprefix("torch."),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
