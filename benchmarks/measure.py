"""Timing contestants in turn, and what is written down about it.

A repeat times every contestant once, in an order that rotates from repeat to repeat, so that all of them meet the same
disturbances of a machine that others use too. Ratios are taken within a repeat; medians and ranges over the repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: Times that every contestant is timed.
        quick: Smallest sizes, for trying the benchmarks themselves; the figures mean nothing.
        foreign: Also time peers that need an environment of their own.
    """

    repeats: int = 5
    quick: bool = False
    foreign: bool = True


@dataclass(frozen=True)
class Contestant:
    """Something to be timed.

    Attributes:
        name: What the table calls it.
        call: One call, without arguments; or, with `timer`, unused.
        calls: Calls in one repeat.
        build_seconds: What preparing it took (recording, compilation), if that is of interest.
        timer: Times `calls` calls elsewhere and returns the seconds, for peers in processes of their own.
    """

    name: str
    call: Callable[[], object] = lambda: None
    calls: int = 1
    build_seconds: float | None = None
    timer: Callable[[int], float] | None = None

    def seconds(self) -> float:
        """Time one repeat; seconds per call."""
        if self.timer is not None:
            return self.timer(self.calls) / self.calls
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - start) / self.calls


@dataclass(frozen=True)
class Versus:
    """A ratio that is wanted: time of `slow` over time of `fast`.

    Attributes:
        slow: Contestant in the numerator, as a rule a peer.
        fast: Contestant in the denominator, as a rule ours.
        goal: The ratio that is aimed at, if any.
    """

    slow: str
    fast: str
    goal: float | None = None


@dataclass
class Case:
    """One line-up: contestants on the same problem.

    Attributes:
        name: The problem.
        unit: "us", "ms" or "s", per call.
        per: What a call is.
        contestants: Who takes part.
        ratios: Which ratios to report.
        agreement: What was checked to be the same on all sides, with the largest difference found.
        notes: Anything a reader of the figures should know.
    """

    name: str
    unit: str
    per: str
    contestants: Sequence[Contestant]
    ratios: Sequence[Versus]
    agreement: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NotRun:
    """A case that was left out, with the reason."""

    name: str
    reason: str


def built(make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], float]:
    """Make a contestant's call and run it once, with the seconds that took; then warm it up."""
    start = time.perf_counter()
    call = make()
    call()
    seconds = time.perf_counter() - start
    for _ in range(3):  # TorchScript, for one, optimises at the second call
        call()
    return call, seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Every value with median, minimum and maximum, to five digits."""
    rounded = [float(f"{v:.5g}") for v in values]
    return {"values": rounded, "median": float(f"{median(values):.5g}"), "min": min(rounded), "max": max(rounded)}


def race(case: Case, repeats: int) -> dict[str, Any]:
    """Time all contestants of a case in turn.

    Args:
        case: The line-up; every call has run at least once.
        repeats: Number of rounds.

    Returns:
        The record of this case, for JSON.
    """
    num = len(case.contestants)
    seconds: dict[str, list[float]] = {c.name: [] for c in case.contestants}
    for number in range(repeats):
        for position in range(num):
            contestant = case.contestants[(position + number) % num]
            seconds[contestant.name].append(contestant.seconds())
    scale = UNITS[case.unit]
    return {
        "case": case.name,
        "unit": case.unit,
        "per": case.per,
        "contestants": [
            {
                "name": c.name,
                "calls": c.calls,
                "build_seconds": None if c.build_seconds is None else round(c.build_seconds, 2),
                **spread([scale * s for s in seconds[c.name]]),
            }
            for c in case.contestants
        ],
        "ratios": [_ratio(versus, seconds) for versus in case.ratios],
        "agreement": {name: float(f"{value:.2g}") for name, value in case.agreement.items()},
        "notes": list(case.notes),
    }


def _ratio(versus: Versus, seconds: dict[str, list[float]]) -> dict[str, Any]:
    pairs = zip(seconds[versus.slow], seconds[versus.fast], strict=True)
    return {"slow": versus.slow, "fast": versus.fast, "goal": versus.goal, **spread([a / b for a, b in pairs])}
