"""Coordinates of theta: a flat unconstrained vector, named constrained sites, and restrictions to some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.sites import Site

if TYPE_CHECKING:
    from inference.programs import Programs


class Coordinates:
    """What a target knows about its theta; a base class without fields of its own.

    Attributes:
        programs: Recorded graphs.
        sites: Latent sites held by theta, with their slices.
        kept: For a restricted target, the (start, stop) pieces of the full theta that it holds.
        at: For a restricted target, the full theta that fixes the rest.
        entries: Where it holds single entries, their positions in the full theta, (P,).
    """

    if TYPE_CHECKING:
        programs: Programs
        sites: tuple[Site, ...]
        kept: tuple[tuple[int, int], ...] | None
        at: Tensor | None
        entries: Tensor | None

    @property
    def dim(self) -> int:
        """Number of entries P of theta."""
        return self.sites[-1].stop

    @property
    def full_dim(self) -> int:
        """Number of entries of the unrestricted theta."""
        return self.programs.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of theta."""
        return self.programs.traced.dtype

    @property
    def device(self) -> torch.device:
        """Device of theta and of the data."""
        return self.programs.traced.device

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Every latent site of the model, with slices of the full theta."""
        return self.programs.traced.sites

    def unravel(self, theta: Tensor) -> dict[str, Tensor]:
        """Constrained values by site name; a restricted target fills in the fixed sites.

        Args:
            theta: (..., P).

        Returns:
            Tensors (..., *site shape), for every latent site of the model.
        """
        full = self.expand(theta)
        return {s.name: s.constrain(full[..., s.start : s.stop]) for s in self.all_sites}

    def ravel(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Flat unconstrained vector of constrained values.

        Args:
            sites: Tensors (..., *site shape), at least for this target's sites.

        Returns:
            (..., P).

        Raises:
            ValueError: If a site is missing, misshapen or outside its support.
        """
        held = {site.name for site in self.sites}
        pieces = []
        for site in (s for s in self.all_sites if s.name in held):
            if site.name not in sites:
                raise ValueError(f"no value for site {site.name!r}; expected {[s.name for s in self.sites]}")
            value = torch.as_tensor(sites[site.name], dtype=self.dtype, device=self.device)
            lead = value.shape[: value.dim() - len(site.shape)]
            if value.shape[len(lead) :] != site.shape:
                raise ValueError(f"site {site.name!r} has shape {tuple(value.shape)}, expected (..., {site.shape})")
            flat = site.transform.inv(value).reshape((*lead, site.size))
            if not torch.isfinite(flat).all():
                raise ValueError(f"site {site.name!r} holds values outside its support {site.support}")
            pieces.append(flat)
        whole = torch.cat(pieces, -1)
        if self.entries is None:
            return whole
        owned = torch.cat([torch.arange(s.start, s.stop) for s in self.all_sites if s.name in held])
        return whole[..., torch.searchsorted(owned, self.entries.cpu()).to(whole.device)]

    def expand(self, theta: Tensor) -> Tensor:
        """Full theta of a restricted one (the identity otherwise).

        Args:
            theta: (..., P).

        Returns:
            (..., full P).
        """
        if self.kept is None or self.at is None:
            return theta
        if self.entries is not None:
            lead = theta.shape[:-1]
            index = self.entries.expand((*lead, -1))
            return self.at.expand((*lead, -1)).scatter(-1, index, theta)
        pieces, full, small = [], 0, 0
        lead = theta.shape[:-1]
        for start, stop in self.kept:
            pieces += [self.at[full:start].expand((*lead, start - full)), theta[..., small : small + stop - start]]
            full, small = stop, small + stop - start
        pieces.append(self.at[full:].expand((*lead, self.full_dim - full)))
        return torch.cat(pieces, -1)

    def reduce(self, full: Tensor) -> Tensor:
        """Entries of a full theta that a restricted target holds: (..., full P) to (..., P)."""
        if self.kept is None:
            return full
        if self.entries is not None:
            return full[..., self.entries]
        return torch.cat([full[..., a:b] for a, b in self.kept], -1)
