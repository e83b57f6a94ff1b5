"""Is there room for a dense matrix? Asked before it is made: the answer is an error, not a killed process."""

import os
from pathlib import Path

import torch


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
