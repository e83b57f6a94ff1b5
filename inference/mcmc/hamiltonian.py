r"""What HMC and NUTS share: fields, the density they integrate, and what a finished run reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inference.backend import Backend, Bar, Run, check_integer, check_positive, stacked
from inference.errors import ConvergenceWarning, DivergenceWarning, NonFiniteError
from inference.graph import CompileOption
from inference.mcmc.chains import Ensemble, Observer, Record, Schedule
from inference.mcmc.lanes import Kernel, Transition
from inference.mcmc.metrics import MASS_MATRICES
from inference.posterior import DrawsPosterior
from inference.target import Target

# A dense mass matrix of each chain, its root and its estimate are held in memory.
_DENSE_BYTES = 4 * 2**30
_COMPILE_ABOVE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class HamiltonianBackend(Backend):
    """Chains that follow Hamiltonian dynamics, adapted as in Stan.

    Attributes:
        num_samples: Kept draws S per chain.
        warmup_steps: Discarded iterations per chain, in which step size and mass matrix adapt.
        num_chains: Chains C; they advance together in one process.
        step_size: First leapfrog step, or None to find one by doubling.
        adapt_step_size: Whether warm-up adapts the step size to ``target_accept``.
        target_accept: Mean acceptance statistic to adapt to, in (0, 1).
        mass_matrix: "diagonal" (posterior variances), "dense" (covariance) or "identity". With fewer than some hundred
            warm-up draws the variances of a thousand weights are noise: prefer "identity" there.
        max_seconds: Stop after this time with the draws so far; None for no limit.
    """

    num_samples: int = 1000
    warmup_steps: int = 1000
    num_chains: int = 4
    step_size: float | None = None
    adapt_step_size: bool = True
    target_accept: float = 0.8
    mass_matrix: Literal["diagonal", "dense", "identity"] = "diagonal"
    max_seconds: float | None = None

    family: ClassVar[str] = "mcmc"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"chains", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_samples", "num_chains", minimum=1)
        check_integer(self, "warmup_steps", minimum=0)
        check_positive(self, "step_size", "target_accept", "max_seconds")
        if not self.target_accept < 1:
            raise ValueError(f"`target_accept` must be between 0 and 1, got {self.target_accept}")
        if self.mass_matrix not in MASS_MATRICES:
            raise ValueError(f"`mass_matrix` must be one of {MASS_MATRICES}, got {self.mass_matrix!r}")

    def kernel(self) -> Kernel:
        """The trajectories of this backend.

        Raises:
            NotImplementedError: Here.
        """
        raise NotImplementedError

    def fit_target(self, target: Target, run: Run) -> DrawsPosterior:
        """Run the chains.

        Args:
            target: Tempered target.
            run: Seed, starting point and counters.

        Returns:
            Draws (C, S, P), with ArviZ's sample statistics.

        Raises:
            NonFiniteError: If the log density is not finite at a starting point.
            KeyboardInterrupt: If Ctrl-C came before every chain had a draw.
            TimeoutError: If ``max_seconds`` passed before every chain had a draw.
        """
        self._check_memory(target)
        starts = target.initial(self.num_chains, run.seed, run.init)
        log_density, data = precise_log_density(target)
        with run.bar(self.num_chains * (self.warmup_steps + self.num_samples), type(self).__name__) as bar:
            ensemble = Ensemble(
                log_density,
                starts,
                # Streams 0..C-1 chose the starting points.
                [run.stream(_STREAM + c) for c in range(self.num_chains)],
                self.kernel(),
                self.schedule(),
                data=data,
                compile=self._compile_option(),
                together=stacked(target, self.num_chains, target.num_data),
                observe=_figures(bar),
            )
            try:
                ensemble.run(self.max_seconds)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; {blame(target, starts)}") from error
        run.count(ensemble.gradients)
        return self._posterior(target, run, ensemble)

    def schedule(self) -> Schedule:
        """Lengths and adaptation of each chain."""
        return Schedule(
            num_samples=self.num_samples,
            warmup_steps=self.warmup_steps,
            step_size=self.step_size,
            adapt_step_size=self.adapt_step_size,
            target_accept=self.target_accept,
            mass_matrix=self.mass_matrix,
        )

    def _compile_option(self) -> CompileOption:
        # The number of calls says nothing about a run that its time limit ends.
        return (
            False
            if self.compile == "auto" and (self.max_seconds or math.inf) < _COMPILE_ABOVE_SECONDS
            else self.compile
        )

    def _posterior(self, target: Target, run: Run, ensemble: Ensemble) -> DrawsPosterior:
        records = ensemble.records
        num = min(len(r) for r in records)
        if ensemble.stopped is not None:
            if num == 0:
                done = min(r.warmed_up for r in records)
                error = KeyboardInterrupt if self.max_seconds is None else TimeoutError
                raise error(
                    f"{ensemble.stopped} ended the run before every chain had a draw: the slowest had done {done} of "
                    f"{self.warmup_steps} warm-up iterations; allow more time or shorten `warmup_steps`"
                )
            run.warn(
                ConvergenceWarning, f"{ensemble.stopped} ended the run after {num} of {self.num_samples} draws a chain"
            )
        stats = sample_stats(records, num)
        run.info.extra["step_size"] = [r.step_sizes[0] for r in records]
        run.info.extra["warmup_divergences"] = [r.warmup_divergences for r in records]
        self._warn(run, stats)
        draws = torch.stack([r.draws[:num] for r in records])
        return DrawsPosterior(target, draws, backend=self, info=run.info, sample_stats=stats)

    def _warn(self, run: Run, stats: dict[str, Tensor]) -> None:
        diverging = int(stats["diverging"].sum())
        if diverging:
            total = stats["diverging"].numel()
            run.warn(
                DivergenceWarning,
                f"{diverging} of {total} draws diverged ({100 * diverging / total:.3g} %): the posterior has regions "
                "that these draws miss; raise `target_accept` or reparametrise the model",
            )

    def _check_memory(self, target: Target) -> None:
        size = 3 * self.num_chains * target.dim**2 * 8
        if self.mass_matrix == "dense" and size > _DENSE_BYTES:
            raise ValueError(
                f'mass_matrix="dense" needs about {size / 2**30:.0f} GiB for {target.dim} parameters and '
                f'{self.num_chains} chains; use "diagonal" or "identity"'
            )


_STREAM = 1_000_000


def precise_log_density(target: Target) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The tempered log density with its sum over the data in float64.

    Acceptance needs differences well below 1 nat of energies of 1e4 to 1e6, which float32 sums do not carry.

    Args:
        target: The target.

    Returns:
        Function of theta (P,) and tensors, giving () nats in float64; and the tensors.
    """
    leaves, spec = pytree.tree_flatten((target.x, target.y))

    def log_density(theta: Tensor, *leaves: Tensor) -> Tensor:
        x, y = pytree.tree_unflatten(list(leaves), spec)
        prior, likelihood = target.programs.joint(target.expand(theta), x, y)
        tempered = likelihood.double().sum() / target.likelihood_temperature
        return (prior.double() + tempered) / target.temperature

    return log_density, tuple(leaves)


def sample_stats(records: list[Record], num: int) -> dict[str, Tensor]:
    """Statistics of the first ``num`` kept draws of each chain under ArviZ's names, each (C, S)."""

    def column(of: Callable[[Transition], float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([[of(t) for t in r.transitions[:num]] for r in records], dtype=dtype)

    return {
        "diverging": column(lambda t: t.diverging, torch.bool),
        "tree_depth": column(lambda t: t.tree_depth, torch.int64),
        "n_steps": column(lambda t: t.num_steps, torch.int64),
        "acceptance_rate": column(lambda t: t.acceptance),
        "energy": column(lambda t: t.energy),
        "lp": torch.tensor([r.log_densities[:num] for r in records], dtype=torch.float64),
        "step_size": torch.tensor([r.step_sizes[:num] for r in records], dtype=torch.float64),
    }


@torch.no_grad()
def blame(target: Target, starts: Tensor) -> str:
    """Which part of the model is not finite at the starting points, and what to do."""
    advice = "pass `init`, for example a MAP posterior"
    for chain, theta in enumerate(starts):
        if not torch.isfinite(target.log_prior(theta)):
            sites = target.unravel(theta)
            odd = [s.name for s in target.sites if not torch.isfinite(sites[s.name]).all()] or [
                s.name for s in target.sites
            ]
            return f"at the start of chain {chain} the prior is not finite (site {odd[0]!r}): {advice}"
        bad = torch.nonzero(~torch.isfinite(target.log_likelihood(theta))).flatten().tolist()
        if bad:
            return (
                f"at the start of chain {chain} the likelihood of site {target.observed!r} is not finite at "
                f"{len(bad)} data, the first at row {bad[0]}: check the data and the model there, or {advice}"
            )
    return f"log prior and log-likelihood are finite there, so it is the gradient: {advice}"


def _figures(bar: Bar) -> Observer:
    divergences = 0

    def observe(transition: Transition, step_size: float) -> None:
        nonlocal divergences
        divergences += transition.diverging
        bar.advance(
            1,
            acceptance=transition.acceptance,
            divergences=divergences,
            leapfrogs=transition.num_steps,
            step_size=step_size,
        )

    return observe
