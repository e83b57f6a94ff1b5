"""Memory that a computation frees stays with the process, so that the next call does not fault it in page by page.

glibc gives the top of its heap back once twice the largest block that it ever unmapped is free there. A recorded graph
frees a few megabytes at the end of every call: 1,900 page faults a call, half of its time, for four chains of 8-50-1 on
2,500 data. The limit follows the largest block that was freed, up to 32 MiB, so one untouched block raises it for good.
"""

from __future__ import annotations

from functools import cache

import torch

# Just below the largest block that glibc learns from. Up to twice as much freed memory is kept from then on.
_BYTES = 32 * 2**20 - 2**16


@cache
def keep_freed_memory() -> None:
    """Have the process keep up to 64 MiB of freed memory; without effect on other allocators than glibc's."""
    torch.empty(_BYTES, dtype=torch.uint8)
