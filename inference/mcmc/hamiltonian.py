r"""What HMC and NUTS share: fields, the density they integrate, and what a finished run reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inference.backend import Run, check_integer, check_positive, stacked
from inference.errors import NonFiniteError
from inference.mcmc.chain import Schedule
from inference.mcmc.chain_backend import STREAM, ChainBackend, warn_of_divergences
from inference.mcmc.lanes import Kernel
from inference.mcmc.low_rank import CAPACITY
from inference.mcmc.mass import initial_metric
from inference.mcmc.metrics import MASS_MATRICES, MassMatrix
from inference.mcmc.recording import Recorder
from inference.mcmc.workers import Job, Outcome, portable_density, run_in_workers
from inference.posterior import DrawsPosterior, GaussianPosterior
from inference.target import Target

# A dense mass matrix of each chain, its root and its estimate are held in memory; or the window of a low-rank one.
_MASS_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class HamiltonianBackend(ChainBackend):
    """Chains that follow Hamiltonian dynamics, adapted as in Stan.

    Attributes:
        step_size: First leapfrog step, or None to find one by doubling.
        adapt_step_size: Whether warm-up adapts the step size to ``target_accept``.
        target_accept: Mean acceptance statistic to adapt to, in (0, 1).
        mass_matrix: What warm-up adapts: "diagonal" (posterior variances), "dense" (covariance) or "low_rank"
            (variances and ``mass_rank`` directions); or what stays as it is: "identity", "prior" (prior variances), or
            a Gaussian posterior of the same model, a Laplace approximation say, whose covariance becomes the inverse
            mass. With fewer than some hundred warm-up draws the variances of a thousand weights are noise: prefer a
            fixed one.
        mass_rank: Directions R of "low_rank".
        init_jitter: Standard deviation of Gaussian noise added to the starting points in unconstrained space, for
            chains that all start at one point such as a mode.
        num_workers: Processes that share the chains (through joblib); each needs some seconds to start and records its
            own program. Set ``torch.set_num_threads(1)`` so that they do not compete.
        chains_per_block: Chains that one call advances; None for all that a process runs, or one where networks are
            large. Products of another batch size round differently, and chains amplify rounding: draws are the same
            to the bit, whatever ``num_workers``, where this is.
    """

    step_size: float | None = None
    adapt_step_size: bool = True
    target_accept: float = 0.8
    mass_matrix: MassMatrix | GaussianPosterior = "diagonal"
    mass_rank: int = 10
    init_jitter: float = 0.0
    num_workers: int = 1
    chains_per_block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "step_size", "target_accept")
        check_integer(self, "mass_rank", "num_workers", "chains_per_block", minimum=1)
        if self.warmup_steps == 0 and self.step_size is None:
            raise ValueError(
                "`warmup_steps` must be >= 1 where the step size is adapted, got 0; give `step_size` to go without"
            )
        if self.num_workers > 1 and getattr(self, "num_shards", 1) > 1:
            raise ValueError(
                "`num_workers` must be 1 with `num_shards` > 1: shards are for data too large to be copied"
            )
        if not 0 <= self.init_jitter < math.inf:
            raise ValueError(f"`init_jitter` must be >= 0, got {self.init_jitter}")
        if not self.target_accept < 1:
            raise ValueError(f"`target_accept` must be between 0 and 1, got {self.target_accept}")
        if not isinstance(self.mass_matrix, GaussianPosterior) and self.mass_matrix not in MASS_MATRICES:
            raise ValueError(
                f"`mass_matrix` must be one of {MASS_MATRICES} or a Gaussian posterior, got {self.mass_matrix!r}"
            )

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
        """
        self._check_memory(target)
        self.warn_of_one_chain(run)
        starts = self._starts(target, run)
        metric = initial_metric(self.mass_matrix, target, starts[0], self.mass_rank)
        recording = self.recording(target)
        size = self._block_size(target)
        checkpoint = self.open_checkpoint(target, run, starts, {"mass_matrix": metric.inverse_mass}, size)
        log_density, data = self.density(target)
        job = Job(
            log_density,
            data,
            starts,
            run.seed,
            STREAM,
            self.kernel(),
            self.schedule(),
            metric,
            recording,
            self.compile_option(),
            size if checkpoint is None else checkpoint.chains_per_block,
            checkpoint,
        )
        with run.bar(self.num_chains * (self.warmup_steps + self.num_samples), type(self).__name__) as bar:
            recorder = Recorder(recording, starts)
            try:
                if self.num_workers > 1:
                    outcome = run_in_workers(job, recorder, target, self.num_workers, self.max_seconds, bar)
                else:
                    outcome = job.run(recorder, self.max_seconds, bar)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; {blame(target, starts)}") from error
        run.count(outcome.gradients)
        return self._posterior(target, run, outcome, recorder)

    def density(self, target: Target) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The density that trajectories follow, and the tensors it reads besides theta."""
        return precise_log_density(target)

    def _starts(self, target: Target, run: Run) -> Tensor:
        starts = target.initial(self.num_chains, run.seed, run.init)
        if self.init_jitter:
            for chain, start in enumerate(starts):
                stream = run.stream(_JITTER_STREAM + chain)
                start += self.init_jitter * torch.randn(
                    start.shape, generator=stream, dtype=start.dtype, device=start.device
                )
        return starts

    def _block_size(self, target: Target) -> int:
        if self.chains_per_block is not None:
            return self.chains_per_block
        share = -(-self.num_chains // self.num_workers)
        return share if stacked(target, share, target.num_data) else 1

    def schedule(self) -> Schedule:
        """Lengths and adaptation of each chain."""
        return Schedule(
            num_samples=self.num_samples,
            warmup_steps=self.warmup_steps,
            step_size=self.step_size,
            adapt_step_size=self.adapt_step_size,
            target_accept=self.target_accept,
        )

    def _posterior(self, target: Target, run: Run, outcome: Outcome, recorder: Recorder) -> DrawsPosterior:
        if outcome.stopped is not None:
            self.report_stop(run, outcome.stopped, recorder.num_kept, min(outcome.warmed_up))
        posterior = self.posterior_of(target, run, recorder, _DTYPES)
        run.info.extra["step_size"] = posterior.sample_stats["step_size"][:, 0].tolist()
        run.info.extra["warmup_divergences"] = outcome.warmup_divergences
        self._warn(run, posterior.sample_stats)
        return posterior

    def _warn(self, run: Run, stats: dict[str, Tensor]) -> None:
        warn_of_divergences(run, stats, "raise `target_accept` or reparametrise the model")

    def _check_memory(self, target: Target) -> None:
        numbers = {"dense": 3 * target.dim**2, "low_rank": (2 * CAPACITY + 6 * self.mass_rank) * target.dim}
        size = 8 * self.num_chains * numbers.get(self.mass_matrix, 0) if isinstance(self.mass_matrix, str) else 0
        if size > _MASS_BYTES:
            raise ValueError(
                f'mass_matrix="{self.mass_matrix}" needs about {size / 2**30:.0f} GiB for {target.dim} parameters and '
                f'{self.num_chains} chains; use "diagonal" or "identity"'
            )


_JITTER_STREAM = 300_000
_DTYPES = {"diverging": torch.bool, "tree_depth": torch.int64, "n_steps": torch.int64}


def precise_log_density(target: Target) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The tempered log density with its sums in float64, and the tensors that it reads besides theta.

    Args:
        target: The target.

    Returns:
        See :func:`~inference.mcmc.workers.portable_density`; and the leaves of the data.
    """
    return portable_density(target), tuple(pytree.tree_leaves((target.x, target.y)))


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
