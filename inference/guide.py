"""Any posterior as a Pyro guide: one flat auxiliary site, unpacked into the latent sites as Pyro's own guides do."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

if TYPE_CHECKING:
    from inference.posterior_base import Posterior


def run_as_guide(posterior: Posterior) -> dict[str, Tensor]:
    """Sample every latent site of the model from a posterior, inside Pyro's handlers.

    Args:
        posterior: The posterior.

    Returns:
        Constrained values by site name.
    """
    theta = pyro.sample("_posterior_theta", ThetaDistribution(posterior), infer={"is_auxiliary": True})
    full = posterior.target.expand(theta)
    values = {}
    plates: dict[
        str, Any
    ] = {}  # entered again by every site they hold: a second plate of the same name would be refused
    for site in posterior.target.all_sites:
        unconstrained = full[..., site.start : site.stop]
        lead = full.shape[:-1] + (1,) * (site.event_dim + len(site.unconstrained_shape) - len(site.shape))
        shape = torch.broadcast_shapes(site.unconstrained_shape, lead)
        unconstrained = unconstrained.reshape(shape)
        value = site.transform(unconstrained)
        log_density = site.transform.inv.log_abs_det_jacobian(value, unconstrained)
        log_density: Any = sum_rightmost(log_density, log_density.dim() - value.dim() + site.event_dim)
        with ExitStack() as stack:
            for name, dim in site.plates:
                if name not in plates:
                    plates[name] = pyro.plate(name, site.shape[dim - site.event_dim], dim=dim)
                stack.enter_context(plates[name])
            values[site.name] = pyro.sample(
                site.name, dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
            )
    return values


class ThetaDistribution(TorchDistribution):
    """The flat posterior as a Pyro distribution; expands, so that vectorised plates draw distinct thetas."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support: Any = constraints.real_vector

    def __init__(self, posterior: Posterior, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.posterior = posterior
        super().__init__(batch_shape, torch.Size((posterior.target.dim,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ThetaDistribution:
        """The same distribution over a larger batch."""
        return ThetaDistribution(self.posterior, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from Pyro's global random state, as guides do."""
        shape = torch.Size(sample_shape) + self.batch_shape
        seed = int(torch.randint(2**31, ()))
        thetas = torch.atleast_2d(self.posterior.sample(shape.numel(), seed))
        if thetas.shape[0] == shape.numel():
            return thetas.reshape(shape + self.event_shape)
        raise AssertionError("a posterior must return as many draws as asked for")

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density where the posterior has one; zero for draws, which Predictive does not ask for."""
        if self.posterior.has_log_density:
            return self.posterior.log_density(value)
        return value.new_zeros(value.shape[:-1])
