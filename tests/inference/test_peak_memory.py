import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference import peak_memory
from inference.peak_memory import PeakMemory
from inference.progress import FitInfo, Measured

MIB = 2**20


def pieces(num: int, mebibytes: float = 0.25) -> list[Tensor]:
    """Small enough for the C library to keep their memory when they are freed."""
    return [torch.ones(int(mebibytes * MIB / 4), dtype=torch.float32) for _ in range(num)]


def amounts_to(found: int, mebibytes: int) -> bool:
    """Whether it is a size: the kernel counts pages in batches per core, and torch may need a little beside."""
    return mebibytes - 1 <= found / MIB < mebibytes + 20


def test_a_peak_of_a_moment_counts() -> None:
    with PeakMemory() as memory:
        torch.ones(100 * MIB // 4, dtype=torch.float32)
    assert amounts_to(memory.bytes, 100)


def test_a_fit_after_a_larger_one_is_not_hidden_in_what_that_left_behind() -> None:
    before = pieces(1000)
    held = torch.ones(1)  # above them, so that the heap cannot shrink by itself
    del before
    with PeakMemory() as memory:
        pieces(200)
    assert amounts_to(memory.bytes, 50)
    assert held == 1


def test_what_was_there_before_does_not_count() -> None:
    there = pieces(400)
    with PeakMemory() as memory:
        pass
    assert memory.bytes < 10 * MIB
    del there


def test_one_measurement_inside_another_hides_nothing_from_it() -> None:
    with PeakMemory() as outer:
        torch.ones(100 * MIB // 4, dtype=torch.float32)
        with PeakMemory() as inner:
            torch.ones(40 * MIB // 4, dtype=torch.float32)
    assert amounts_to(inner.bytes, 40)
    assert amounts_to(outer.bytes, 100)


def test_where_the_mark_cannot_be_reset_memory_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_CLEAR", tmp_path)  # a directory, which cannot be written to
    with PeakMemory() as memory:
        held = torch.ones(100 * MIB // 4, dtype=torch.float32)
        time.sleep(0.3)
        del held
        time.sleep(0.1)
    assert amounts_to(memory.bytes, 100)


def test_where_the_system_says_nothing_the_peak_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "status")
    with PeakMemory() as memory:
        pieces(40)
    assert memory.bytes == 0


def test_a_fit_that_fails_leaves_nothing_running() -> None:
    info = FitInfo()

    def fit() -> None:
        with Measured(info):
            torch.ones(100 * MIB // 4, dtype=torch.float32)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit()
    assert amounts_to(info.peak_bytes, 100)
    assert info.seconds > 0
    assert not peak_memory._running
