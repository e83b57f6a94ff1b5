r"""The seam: a Pyro model becomes a pure flat log density.

.. math:: \log p(\theta, y \mid x) = \log p(\theta) + \sum_{n=1}^N \log p(y_n \mid x_n, \theta)

``theta`` holds the latent sites in unconstrained space, concatenated in the order of the model. Every function of
theta is written for one vector and batched with ``torch.func.vmap``; it is recorded once per shape of ``x`` and then
runs without Pyro, the parameter store or the global random state. Prior and per-datum likelihood stay apart:
minibatches scale one of them by N/B, curvature needs per-datum terms, and tempering touches one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad_and_value, vmap

from inference.coordinates import Coordinates
from inference.data import Tree, check_data, check_inputs, floating_dtype, index, map_tree, num_data
from inference.errors import UnsupportedModelError
from inference.graph import CompileOption, hot
from inference.layers import Layer, find_layers
from inference.observation import LikelihoodFamily
from inference.programs import Programs
from inference.restriction import restrict_to_sites
from inference.sites import Site
from inference.starting import random_stream, sample_prior, starting_points
from inference.tracing import Model, TracedModel, isolated

__all__ = ["Site", "Target", "UnsupportedModelError", "compile_target"]


@dataclass(frozen=True)
class Target(Coordinates):
    """Log density of the weights given the data, as pure functions of a flat theta.

    Attributes:
        programs: Recorded graphs.
        x: Training inputs, every leaf (N, ...).
        y: Training targets, (N, ...).
        sites: Latent sites held by theta, with their slices.
        temperature: T of the whole energy, :math:`p^{1/T}`.
        likelihood_temperature: T of the likelihood alone.
        kept: For a restricted target, the (start, stop) pieces of the full theta that it holds.
        at: For a restricted target, the full theta that fixes the rest.
        entries: Where it holds single entries, their positions in the full theta, (P,).
        batch_size: Batch size of the DataLoader the data came from, if any.
        initial_sites: The model's own starting values by site name, if it has any: where one point starts.
        fresh_sites: From a seed to values by site name that further points start at, if the model has any.
        compile: Whether :meth:`log_density_and_grad` goes through Inductor: True, False or "auto".
    """

    programs: Programs
    x: Tree
    y: Tensor
    sites: tuple[Site, ...]
    temperature: float = 1.0
    likelihood_temperature: float = 1.0
    kept: tuple[tuple[int, int], ...] | None = None
    at: Tensor | None = None
    entries: Tensor | None = None
    batch_size: int | None = None
    initial_sites: Mapping[str, Tensor] | None = None
    fresh_sites: Callable[[int], Mapping[str, Tensor]] | None = None
    compile: CompileOption = "auto"

    @property
    def num_data(self) -> int:
        """Number of training data N."""
        return num_data(self.x)

    @property
    def model(self) -> Model:
        """The Pyro callable."""
        return self.programs.traced.model

    @property
    def observed(self) -> str:
        """Name of the observed site."""
        return self.programs.traced.observed

    # -- densities -----------------------------------------------------------------------------------------------

    def log_prior(self, theta: Tensor) -> Tensor:
        r"""Log prior density in unconstrained space, :math:`\log p(\theta)`, untempered.

        Args:
            theta: (P,).

        Returns:
            () nats, normalised, with the log-Jacobian of each constrained site.
        """
        return self.programs.joint(self.expand(theta), self.x, self.y)[0]

    def log_likelihood(self, theta: Tensor, x: Tree | None = None, y: Tensor | None = None) -> Tensor:
        r"""Log-likelihood of each datum, :math:`\log p(y_n \mid x_n, \theta)`, untempered.

        Args:
            theta: Flat unconstrained parameters, (P,).
            x: Inputs, every leaf (B, ...); the training inputs by default.
            y: Targets, (B, ...); the training targets by default.

        Returns:
            (B,) nats; not summed, not scaled by N/B.

        Raises:
            ValueError: If only one of x and y is given.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model(x, y=None):
            ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(x)):
            ...         return pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)
            >>> target = compile_target(model, torch.arange(3.0), torch.ones(3))
            >>> theta = torch.tensor([0.5])
            >>> joint = target.log_prior(theta) + target.log_likelihood(theta).sum()
            >>> torch.allclose(joint, target.log_density(theta))
            True
        """
        x, y = self._data(x, y)
        return self.programs.joint(self.expand(theta), x, y)[1]

    def log_density(self, theta: Tensor) -> Tensor:
        r"""Unnormalised log posterior, :math:`[\log p(\theta) + \sum_n \log p(y_n|x_n,\theta)/T_l]/T`.

        Args:
            theta: (P,).

        Returns:
            () nats.
        """
        return self.log_density_estimate(theta, self.x, self.y)

    def log_density_estimate(self, theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        """Unbiased estimate of :meth:`log_density` from a minibatch: the likelihood sum is scaled by N/B.

        Args:
            theta: (P,).
            x: Inputs, every leaf (B, ...).
            y: Targets, (B, ...).

        Returns:
            () nats.
        """
        prior, likelihood = self.programs.joint(self.expand(theta), x, y)
        weight = self.num_data / likelihood.shape[0] / self.likelihood_temperature
        return (prior + weight * likelihood.sum()) / self.temperature

    def log_density_and_grad(
        self, num: int, *, compile: CompileOption | None = None, num_calls: float = 0
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """One call for the log density and gradient of several thetas.

        Args:
            num: Number C of thetas that advance together.
            compile: See :func:`inference.graph.hot`; None for the choice made in :func:`compile_target`.
            num_calls: Expected number of calls.

        Returns:
            Function from (C, P) to log densities (C,) in nats and gradients (C, P).
        """
        single = grad_and_value(self.log_density_estimate)

        def batched(theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
            if num > 1:
                return vmap(single, in_dims=(0, None, None))(theta, x, y)
            grad, value = single(theta[0], x, y)  # plain matrix products are faster than batched ones of one
            return grad.unsqueeze(0), value.unsqueeze(0)

        example = torch.zeros(num, self.dim, dtype=self.dtype, device=self.device)
        choice = self.compile if compile is None else compile
        program = hot(batched, example, self.x, self.y, compile=choice, num_calls=num_calls)

        x, y = map_tree(Tensor.contiguous, self.x), self.y.contiguous()

        def call(theta: Tensor) -> tuple[Tensor, Tensor]:
            grad, value = program(theta.contiguous(), x, y)
            return value, grad

        return call

    # -- the observed distribution ---------------------------------------------------------------------------------

    def parameters(self, theta: Tensor, x: Tree | None = None) -> dict[str, Tensor]:
        """Parameters of the observed site's distribution.

        Args:
            theta: (P,).
            x: Inputs, every leaf (B, ...); the training inputs by default.

        Returns:
            Tensors by parameter name, each (B, ...).
        """
        return self.programs.parameters(self.expand(theta), self.x if x is None else x)

    def family(self, x: Tree | None = None) -> LikelihoodFamily:
        """Class of the observed distribution.

        Args:
            x: Inputs; the training inputs by default.

        Returns:
            The family, with the parameters that depend on theta marked.
        """
        with torch.no_grad():
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            return self.programs.family(zero, self.x if x is None else x)

    def fisher_family(self, family: LikelihoodFamily, x: Tree) -> LikelihoodFamily:
        """The family whose Fisher information makes up the curvature at some inputs.

        Args:
            family: The target's own, which it is unless the likelihood is looked at elsewhere.
            x: The inputs, every leaf (B, ...).

        Returns:
            The family.
        """
        return family

    def likelihood(self, theta: Tensor, x: Tree | None = None) -> Any:
        """Distribution of the observed site.

        Args:
            theta: (P,).
            x: Inputs, every leaf (B, ...); the training inputs by default.

        Returns:
            Pyro distribution with batch shape (B,) and one datum's target as event.
        """
        x = self.x if x is None else x
        return self.family(x).distribution(self.parameters(theta, x))

    def eta(self, theta: Tensor, x: Tree | None = None) -> Tensor:
        """Unconstrained parameters of the observed distribution, the coordinates of linearisation.

        Args:
            theta: (P,).
            x: Inputs, every leaf (B, ...); the training inputs by default.

        Returns:
            (B, E); see :mod:`inference.observation`.
        """
        x = self.x if x is None else x
        return self.family(x).to_eta(self.parameters(theta, x))

    # -- derived targets ---------------------------------------------------------------------------------------------

    def tempered(self, temperature: float = 1.0, likelihood_temperature: float = 1.0) -> Target:
        """The same target at other temperatures.

        Args:
            temperature: T > 0 dividing the whole energy.
            likelihood_temperature: T > 0 dividing the log-likelihood.

        Returns:
            A new target.

        Raises:
            ValueError: If a temperature is not positive.
        """
        for name, value in (("temperature", temperature), ("likelihood_temperature", likelihood_temperature)):
            if not value > 0:
                raise ValueError(f"`{name}` must be > 0, got {value}")
        return replace(self, temperature=temperature, likelihood_temperature=likelihood_temperature)

    def restrict(self, sites: str | Sequence[str], at: Tensor) -> Target:
        """Keep some sites free and fix the rest.

        Args:
            sites: Site name pattern(s), as in ``fnmatch``: "layers.2.*".
            at: Full theta that supplies the fixed values, (full P,).

        Returns:
            Target over the matching sites only.

        Raises:
            ValueError: If a pattern matches nothing or ``at`` has the wrong length.
        """
        return restrict_to_sites(self, sites, at)

    def recorded(self, num_rows: int | None = None) -> fx.GraphModule:
        """Graph of the joint density: what layers and costs are read from.

        Args:
            num_rows: Data it runs over; all of the training data by default.

        Returns:
            Graph from the full theta, inputs and targets to log prior and log-likelihood.
        """
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        rows = slice(0, num_rows)
        return self.programs._get("joint", self.programs._joint, zero, index(self.x, rows), self.y[rows]).module

    def recorded_any(self) -> fx.GraphModule:
        """As :meth:`recorded`, over however many data were recorded first: for structure, and costs per datum."""
        return self.programs.any_joint() or self.recorded()

    @property
    def recorded_rows(self) -> int:
        """Number of data of :meth:`recorded_any`."""
        inputs = [node for node in self.recorded_any().graph.nodes if node.op == "placeholder"]
        return inputs[-1].meta["val"].shape[0]

    # -- network structure and starting points -----------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Linear, convolution and embedding layers, with the slices of the full theta they read."""
        return find_layers(self.recorded_any(), self.all_sites)

    def stream(self, seed: int, index: int = 0) -> torch.Generator:
        """Random stream of one chain or member, independent of how many others run beside it."""
        return random_stream(seed, index, self.device)

    def streams(self, seed: int, num: int) -> list[torch.Generator]:
        """The first ``num`` streams of a seed."""
        return [self.stream(seed, i) for i in range(num)]

    def sample_prior(self, num: int, seed: int = 0) -> Tensor:
        """Draws from the prior in unconstrained space.

        Args:
            num: Number of draws S.
            seed: Random seed.

        Returns:
            (S, P).
        """
        return sample_prior(self, num, seed)

    def initial(self, num: int, seed: int = 0, init: Any = None) -> Tensor:
        """Starting points; see :mod:`inference.starting` for the rule.

        Args:
            num: Number of points C.
            seed: Random seed.
            init: None (the first at the model's own ``initial_sites``, if it has any, and the others at random), a
                posterior, a dict of constrained sites, or a tensor (P,) or (C, P).

        Returns:
            (C, P).

        Raises:
            ValueError: If ``init`` does not fit this model.
        """
        return starting_points(self, num, seed, init)

    @cached_property
    def prior_draws(self) -> Tensor:
        """A few draws from the prior over the full theta, which random starts are made of, (15, full P)."""
        return sample_prior(replace(self, kept=None, entries=None, at=None, sites=self.all_sites), 15)

    def _data(self, x: Tree | None, y: Tensor | None) -> tuple[Tree, Tensor]:
        if x is None and y is None:
            return self.x, self.y
        if x is None or y is None:
            raise ValueError("x and y must be given together")
        return x, y


def compile_target(
    model: Model, x: Any, y: Any = None, *, compile: CompileOption = "auto", batch_size: int | None = None
) -> Target:
    """Record a Pyro model and its data as a pure log density.

    Args:
        model: Any Pyro callable ``model(x, y=None)`` with global latent sites and one observed site inside
            ``pyro.plate("data", len(x))``.
        x: Tensor, or dict or tuple of tensors with the same first dimension N; or a DataLoader of (x, y).
        y: Targets, (N, ...).
        compile: Put Inductor on the hot gradient: True, False, or "auto" (when the calls ahead repay 2-20 s).
        batch_size: Data per step of what is going to use the target; None for all. The model is recorded and checked
            at that size, which saves a recording; any size works afterwards.

    Returns:
        The target.

    Raises:
        UnsupportedModelError: Naming the site, if the model cannot be recorded.
        ValueError: If the data are empty, not finite or misshapen.
    """
    x, y, loaded = check_data(x, y)
    traced = TracedModel(model, x, y, floating_dtype((x, y)), batch_size=batch_size or loaded)
    programs = Programs(traced)
    own: Any = getattr(model, "initial_sites", None)
    own = own() if callable(own) else own
    fresh: Any = getattr(model, "fresh_sites", None)
    target = Target(
        programs, x, y, traced.sites, batch_size=loaded, initial_sites=own, fresh_sites=fresh, compile=compile
    )
    with torch.no_grad():
        theta = 0.3 * torch.randn(target.dim, generator=target.stream(0), dtype=target.dtype, device=target.device)
        rows = slice(0, None if traced.local_sites else batch_size or loaded)
        some = index(x, rows), y[rows]
        recorded = programs.joint(theta, *some)
        with isolated(target.dtype, target.device):
            traced.check_recorded(programs._joint(theta, *some), recorded)
    return target


def check_new_inputs(target: Target, x: Any) -> Tree:
    """Validate inputs to predict at against the training inputs."""
    return check_inputs(x, like=target.x)
