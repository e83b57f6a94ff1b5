"""Which prior each site gets: one for all, or the first pattern that matches its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnn_models.checks import match_patterns
from bnn_models.priors.base import Prior


@dataclass(frozen=True)
class PerSite(Prior):
    """Different priors for different sites: the first pattern that matches the site name decides.

    Models accept the bare dictionary in place of this class.

    Attributes:
        priors: From `fnmatch` patterns on dotted site names to priors; None keeps the pretrained value
            (`bayesianize` only).
    """

    priors: Mapping[str, Prior | None]

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: If there is no pattern.
            TypeError: If a value is neither a prior nor None.
        """
        if not self.priors:
            raise ValueError("`priors` is empty; give at least one pattern, such as {'*': Normal()}")
        object.__setattr__(self, "priors", dict(self.priors))
        for pattern, prior in self.priors.items():
            if prior is not None and (not isinstance(prior, Prior) or isinstance(prior, PerSite)):
                raise TypeError(f"the prior of pattern '{pattern}' must be a single prior or None, got {prior!r}")


def assign(prior: Prior | Mapping[str, Prior | None], names: Sequence[str]) -> dict[str, Prior | None]:
    """Give each site its prior.

    Args:
        prior: One prior for all sites, or a dictionary from `fnmatch` patterns to priors.
        names: Names of all sites.

    Returns:
        From site name to its prior, in the order of ``names``; None for a site that stays constant.

    Raises:
        TypeError: If ``prior`` is neither a prior nor a dictionary.
    """
    if isinstance(prior, Mapping):
        prior = PerSite(prior)
    if not isinstance(prior, Prior):
        raise TypeError(f"`prior` must be a prior such as priors.Normal(1.0), or a dictionary of them, got {prior!r}")
    if not isinstance(prior, PerSite):
        prior.check(names)
        return dict.fromkeys(names, prior)
    matches = match_patterns(prior.priors, names)
    for pattern, single in prior.priors.items():
        if single is not None:
            single.check([name for name in names if matches[name] == pattern])
    return {name: prior.priors[matches[name]] for name in names}
