r"""Gaussian priors read off a recorded model, and the groups of weights that share one unknown prior precision.

The prior of a weight can be chosen by the evidence where it is :math:`N(m_i, 1 / A_i)` with a known mean and precision:
then its curvature is the same everywhere, and

.. math:: A_i = a_{g(i)} b_i

with one number a per group and fixed relative precisions b: the declared ones (with geometric mean 1 in each group, so
that a is the precision where a group has only one), or those of the g-prior, the diagonal of the curvature.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vjp

from inference.double import prior_in_double
from inference.target import Site, Target

Groups = Literal["all", "site", "weight"]
Scaling = Literal["declared", "g_prior"]

_GROUPS, _SCALINGS = ("all", "site", "weight"), ("declared", "g_prior")
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class DeclaredPrior:
    """The declared prior of theta, where it is Gaussian, and its curvature at one point elsewhere.

    Attributes:
        sites: The sites whose precision may be chosen.
        mean: Prior means of their entries, (P,), and anything elsewhere.
        precision: Prior precisions (curvatures, outside ``sites``), all > 0, (P,).
    """

    sites: tuple[Site, ...]
    mean: Tensor
    precision: Tensor


@dataclass(frozen=True, eq=False)
class PriorGroups:
    """Which entries of theta share a prior precision.

    Attributes:
        prior: The declared prior.
        names: Names of the G groups: sites, or "all".
        index: Group of each entry, (P,); G for the entries that keep their declared precision.
        base: Relative precisions b, (P,); the precisions themselves for the entries that keep them.
        start: Logarithms of a for the declared prior, (G,); with the g-prior, the nearest in geometric mean.
    """

    prior: DeclaredPrior
    names: tuple[str, ...]
    index: Tensor
    base: Tensor
    start: Tensor

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return len(self.start)

    @property
    def uniform(self) -> bool:
        """Whether all entries of theta are in one group."""
        return self.num_groups == 1 and not bool((self.index == 1).any())

    def factors(self, log_precision: Tensor) -> Tensor:
        """Factor a of every group and, last, the one of the entries that keep their precision: (G,) to (G + 1,)."""
        return torch.cat([log_precision, log_precision.new_zeros(1)]).exp()

    def precision(self, log_precision: Tensor) -> Tensor:
        """Prior precision of every entry: (G,) to (P,)."""
        return self.factors(log_precision)[self.index] * self.base

    def total(self, values: Tensor) -> Tensor:
        """Sums of an entry-wise quantity over the groups: (P,) to (G,)."""
        return values.new_zeros(self.num_groups + 1).index_add(0, self.index, values)[:-1]


def declared_prior(target: Target, theta: Tensor, sites: str | Sequence[str] | None = None) -> DeclaredPrior:
    """Read means and precisions off the log prior's gradient, and see that it is Gaussian where it is to be tuned.

    Args:
        target: The compiled model.
        theta: Where the other sites' curvature is taken, (P,).
        sites: Name pattern(s) of the sites to tune, as in ``fnmatch``; None for all.

    Returns:
        The prior.

    Raises:
        ValueError: If a pattern matches nothing, or a site's prior is not of that form; it names the site.
    """
    chosen = _matching(target, sites)
    gradient, product = _derivatives(target, theta)
    at = theta.detach().double()
    probe = torch.randn(at.shape, generator=torch.Generator().manual_seed(0), dtype=at.dtype).to(at.device)
    precision, pushed = -product(torch.ones_like(at)), -product(probe)
    here = gradient(at)
    wrong = ~_close(pushed, precision * probe) | ~(precision > 0)
    for site in target.sites:
        if site not in chosen and bool(wrong[site.start : site.stop].any()):
            raise ValueError(
                f"the prior of site {site.name!r} is tied to other entries of theta or does not curve downwards at the "
                "mode, so its part of the evidence cannot be held fixed: fix that site with Subset"
            )
    for distance in (1.0, 30.0):  # a Gaussian's gradient is linear however far one goes
        moved = at + distance
        for site in target.sites:
            if site not in chosen:  # whatever curves there must not be seen through a coupling
                moved[site.start : site.stop] = at[site.start : site.stop]
        wrong |= ~_close(gradient(moved) - here, -precision * (moved - at))
    tunable = [s for s in chosen if not bool(wrong[s.start : s.stop].any()) and _is_real(s)]
    for site in chosen:
        if site not in tunable:
            names = [s.name for s in tunable]
            advice = f"name the sites to tune, such as sites={names}" if names else "declare Normal priors"
            raise ValueError(
                f"the prior of site {site.name!r} is not a Gaussian of known mean and known, independent precisions, "
                f"so its precision cannot be chosen by the evidence: {advice}, or leave it out with Subset"
            )
    return DeclaredPrior(chosen, at + here / precision, precision)


def group_weights(
    target: Target, prior: DeclaredPrior, groups: Groups, scaling: Scaling, curvature: Tensor | None = None
) -> PriorGroups:
    """Lay out the groups.

    Args:
        target: The compiled model.
        prior: Its declared prior.
        groups: "all" for one factor, "site" for one per site, "weight" for one per entry of theta.
        scaling: "declared" for the declared precisions times a factor, "g_prior" for the curvature's diagonal times it.
        curvature: With "g_prior", the diagonal, (P,), float64.

    Returns:
        The groups.

    Raises:
        ValueError: If an option is not one of those.
    """
    for name, value, choices in (("groups", groups, _GROUPS), ("scaling", scaling, _SCALINGS)):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
    names, index = [], torch.full((target.dim,), -1, device=prior.precision.device)
    for site in prior.sites:
        own = slice(site.start, site.stop)
        if groups == "weight":
            index[own] = len(names) + torch.arange(site.size, device=index.device)
            names += [site.name] * site.size
            continue
        if groups == "site" or not names:
            names.append(site.name if groups == "site" else "all")
        index[own] = len(names) - 1
    index[index < 0] = len(names)
    relative = prior.precision if curvature is None else _filled(prior, curvature)
    ones = torch.ones_like(relative)
    sums = [
        ones.new_zeros(len(names) + 1).index_add(0, index, v) for v in (ones, prior.precision.log(), relative.log())
    ]
    declared, found = (total / sums[0].clamp(min=1) for total in sums[1:])
    if curvature is None:
        start, base = declared, relative / declared.exp()[index]
    else:
        start, base = declared - found, relative
    free = index < len(names)
    return PriorGroups(prior, tuple(names), index, torch.where(free, base, prior.precision), start[:-1])


def _filled(prior: DeclaredPrior, curvature: Tensor) -> Tensor:
    """The g-prior's relative precisions; entries that no datum reads get the geometric mean of their site."""
    found = curvature.clamp(min=0).clone()
    for site in prior.sites:
        own = found[site.start : site.stop]
        read = own > 0
        own[~read] = own[read].log().mean().exp() if bool(read.any()) else 1.0
    return found.where(found > 0, 1.0)


def _matching(target: Target, patterns: str | Sequence[str] | None) -> tuple[Site, ...]:
    if patterns is None:
        return target.sites
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [site.name for site in target.sites]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no site matches {pattern!r}; the posterior has {names}")
    if not patterns:
        raise ValueError(f"`sites` is empty; name at least one of {names}, or leave it at None for all")
    return tuple(s for s in target.sites if any(fnmatch.fnmatchcase(s.name, p) for p in patterns))


def _derivatives(target: Target, theta: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Gradient of the log prior, and its Hessian's products at theta, in float64."""
    at = theta.detach().double()
    gradient = grad(prior_in_double(target))
    pullback = vjp(gradient, at)[1]
    return gradient, lambda tangent: pullback(tangent)[0]


def _is_real(site: Site) -> bool:
    """Whether theta holds the value of the site itself."""
    probe = torch.linspace(-2.0, 2.0, site.size)
    value = site.constrain(probe)
    return value.numel() == site.size and torch.equal(value.reshape(-1), probe)


def _close(found: Tensor, expected: Tensor) -> Tensor:
    """Entry by entry, up to rounding."""
    return (found - expected).abs() <= _TOLERANCE * (expected.abs() + torch.finfo(expected.dtype).tiny)
