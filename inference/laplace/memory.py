"""Is there room for a dense matrix? Asked before it is made: the answer is an error, not a killed process."""

import os
from pathlib import Path

import torch

from inference.target import Target

# H, the precision, its Cholesky factor and the factorisation's or the eigensolver's workspace, in float64.
_MATRICES = 4


def available_bytes(device: torch.device) -> int | None:
    """Memory a new tensor could take, in bytes.

    Args:
        device: Where the tensor would live.

    Returns:
        Free memory of the GPU; on a CPU what the system calls available, within this process's container; None where
        the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_meminfo_available(), _container_limit()) if value is not None]
    return min(found) if found else _physical_memory()


def require_memory(num_bytes: int, what: str, advice: str, device: torch.device) -> None:
    """Refuse to start on something that does not fit.

    Args:
        num_bytes: Bytes about to be needed.
        what: What needs them, for the message.
        advice: What would fit instead, for the message.
        device: Where they are needed.

    Raises:
        ValueError: If fewer bytes are available; it names both sizes and the advice.
    """
    available = available_bytes(device)
    if available is not None and num_bytes > available:
        raise ValueError(
            f"{what} needs about {num_bytes / 1e9:,.1f} GB, but {available / 1e9:,.1f} GB of memory are available; "
            f"{advice}"
        )


def structure_bytes(target: Target, rank: int = 50) -> dict[str, int]:
    """Memory that each structure of a covariance needs while it is made, in bytes, beside activations.

    Args:
        target: The model.
        rank: Number of eigenpairs of the low-rank one.

    Returns:
        Bytes by the name of the backend, the fullest structure first.
    """
    squares = sum((layer.fan_in + 1) ** 2 + layer.fan_out**2 for layer in target.layers if layer.kind != "embedding")
    squares += sum(layer.fan_out**2 for layer in target.layers if layer.kind == "embedding")
    vectors = 8 * _MATRICES * target.dim
    return {
        "DenseLaplace": 8 * _MATRICES * target.dim**2,
        "KroneckerLaplace": 8 * _MATRICES * squares + vectors,
        # Lanczos holds twice as many vectors as it is asked for.
        "LowRankLaplace": 8 * min(max(2 * rank + 1, 20) + rank, 3 * target.dim) * target.dim + vectors,
        "DiagonalLaplace": vectors,
    }


def require_structure(target: Target, name: str, rank: int = 50) -> None:
    """Refuse a structure that does not fit, and say which do.

    Args:
        target: The model.
        name: Backend of the structure, as in `structure_bytes`.
        rank: Number of eigenpairs of the low-rank one.
    """
    sizes, available = structure_bytes(target, rank), available_bytes(target.device)
    others = list(sizes)[list(sizes).index(name) + 1 :]
    fitting = [f"{other}() ({sizes[other] / 1e9:.2g} GB)" for other in others if sizes[other] <= (available or 0)]
    require_memory(
        sizes[name],
        f"{name} of P = {target.dim:,} parameters",
        f"use {', '.join([*fitting, f'Subset({name}(), sites=...) for a part of the network'])}",
        target.device,
    )


def _meminfo_available() -> int | None:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_limit() -> int | None:
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None


def _physical_memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
