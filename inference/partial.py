"""Draws of some sites of a model, for chains whose whole theta would not fit: diagnosed, but not predicted with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from inference.errors import CapabilityError
from inference.posterior import DrawsPosterior
from inference.posterior_base import Posterior
from inference.target import Site, Target


class PartialDrawsPosterior(DrawsPosterior):
    """Draws of some sites, with their chains.

    Args:
        target: The compiled model, all sites of it.
        draws: (C, S, p), unconstrained, entries of the kept sites.
        kept: The kept sites, with their slices of the p entries.
        **common: As for :class:`~inference.posterior.DrawsPosterior`.

    Raises:
        ValueError: If shapes disagree.
    """

    kind = "draws of some sites"
    complete: ClassVar[bool] = False

    def __init__(self, target: Target, draws: Tensor, *, kept: Sequence[Site], **common: Any) -> None:
        self.kept = tuple(kept)
        super().__init__(target, draws, **common)

    def _row_size(self) -> int:
        return self.kept[-1].stop

    def kept_sites(self) -> dict[str, Tensor]:
        """Constrained values of the kept sites by name, each (C, S, *site shape)."""
        return {s.name: s.constrain(self._draws[..., s.start : s.stop]) for s in self.kept}

    def sample_sites(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw the kept sites.

        Args:
            num_samples: Number of draws S.
            seed: Random seed.

        Returns:
            Constrained values by site name, each (S, *site shape).
        """
        rows = super().sample(num_samples, seed)
        return {s.name: s.constrain(rows[..., s.start : s.stop]) for s in self.kept}

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Not possible: theta is not known as a whole."""
        self._refuse("sample theta; `.sample_sites(num_samples)` draws the kept sites")

    def components(self, num_samples: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Not possible: theta is not known as a whole."""
        self._refuse("predict")

    @property
    def mean_theta(self) -> Tensor:
        """Not possible: theta is not known as a whole."""
        self._refuse("give a mean theta")

    def starting_points(self, num: int, seed: int, expected: list[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Not possible: theta is not known as a whole."""
        self._refuse("be the `init` of another fit")

    def _refuse(self, what: str) -> NoReturn:
        names = [s.name for s in self.kept]
        missing = [s.name for s in self.target.sites if s.name not in names]
        raise CapabilityError(
            f"this posterior holds only the sites {names}, not {missing}, so it cannot {what}; fit without `keep`, "
            "with `draws_on_disk` if memory is short, or ask for function values with `probe_inputs`"
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Draws, weights, statistics, and which sites they are of."""
        figures, tensors = super().state()
        return {**figures, "kept": [s.name for s in self.kept]}, tensors

    @classmethod
    def from_state(
        cls, target: Target, figures: dict[str, Any], tensors: dict[str, Tensor], **common: Any
    ) -> Posterior:
        """Undo :meth:`state`."""
        by_name = {s.name: s for s in target.sites}
        kept = packed_sites([by_name[name] for name in figures["kept"]])
        return super().from_state(target, figures, tensors, kept=kept, **common)


def packed_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The same sites with slices of a vector that holds only them.

    Args:
        sites: With slices of the whole theta.

    Returns:
        With consecutive slices from 0.
    """
    packed, start = [], 0
    for site in sites:
        packed.append(replace(site, start=start, stop=start + site.size))
        start += site.size
    return tuple(packed)
