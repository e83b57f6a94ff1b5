"""What every backend made of chains shares: how long, what is recorded, where it is written, and how it goes on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inference.backend import Backend, Run, check_integer, check_positive
from inference.errors import ConvergenceWarning, DivergenceWarning
from inference.graph import CompileOption
from inference.mcmc.checkpoint import Checkpoint, identify, refuse_leftovers
from inference.mcmc.recording import Recorder, Recording, matching_sites
from inference.mixtures import location
from inference.partial import PartialDrawsPosterior, packed_sites
from inference.posterior import DrawsPosterior
from inference.target import Target, check_new_inputs
from inference.warning_signs import MANY_CHAINS, MIN_DRAWS, refuse_one_chain, single_chain_signs

# First random stream of the chains. Streams 0..C-1 chose the starting points; the next seed begins a million on.
STREAM = 100_000
_COMPILE_ABOVE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class ChainBackend(Backend):
    """Chains of draws.

    Attributes:
        num_samples: Iterations per chain after warm-up; every ``thinning``-th is kept, so S is their quotient.
        warmup_steps: Discarded iterations per chain, in which the method adapts.
        num_chains: Chains C, at least 2 unless ``allow_one_chain``.
        thinning: Keep every k-th draw. Statistics of the draws in between are summed up: divergences by "any",
            leapfrogs by their sum, acceptance by its mean.
        keep: Site pattern(s) as in ``fnmatch``; only matching sites are kept. Such a posterior diagnoses and converts
            to ArviZ, but cannot predict: pass ``probe_inputs`` for the function values that are wanted.
        draws_on_disk: Directory to write draws to as they come, for chains that do not fit into memory; the posterior
            reads them through a memory map.
        probe_inputs: Inputs, every leaf (N, ...), at which the latent function of each draw is recorded
            (``posterior.probe_values``).
        checkpoint: Directory to write the state of the chains to. ``fit`` with the same arguments goes on from there
            to the same draws, to the bit, as without the interruption; it may ask for more ``num_samples``.
        checkpoint_every: Iterations of a chain between two checkpoints.
        max_seconds: Stop after this time with the draws so far; None for no limit.
        allow_one_chain: Take ``num_chains=1``, which no R-hat can vouch for, with a warning instead of an error.
    """

    num_samples: int = 1000
    warmup_steps: int = 1000
    num_chains: int = 4
    thinning: int = 1
    keep: str | Sequence[str] | None = None
    draws_on_disk: str | os.PathLike[str] | None = None
    probe_inputs: Any = field(default=None, repr=False, compare=False)
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 100
    max_seconds: float | None = None
    allow_one_chain: bool = False

    family: ClassVar[str] = "mcmc"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"chains", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_samples", "num_chains", "thinning", "checkpoint_every", minimum=1)
        check_integer(self, "warmup_steps", minimum=0)
        refuse_one_chain(self.num_chains, self.allow_one_chain)
        check_positive(self, "max_seconds")
        if self.thinning > self.num_samples:
            raise ValueError(
                f"`thinning` must be <= `num_samples`, or no draw is kept, got {self.thinning} > {self.num_samples}"
            )
        kept = self.num_samples // self.thinning
        if kept < MIN_DRAWS and self.num_chains < MANY_CHAINS:
            raise ValueError(
                f"`num_samples`={self.num_samples} and `thinning`={self.thinning} keep {kept} draw(s) of each chain: "
                f"R-hat and ESS need at least {MIN_DRAWS} (or {MANY_CHAINS} chains and more, whose groups are compared)"
            )
        patterns = [self.keep] if isinstance(self.keep, str) else self.keep
        if patterns is not None and not (isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)):
            raise ValueError(f"`keep` must be a site pattern, several of them or None, got {self.keep!r}")
        leaves = [] if self.probe_inputs is None else pytree.tree_leaves(self.probe_inputs)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(f"`probe_inputs` must be a tensor, or tensors like x, got {self.probe_inputs!r}")
        if isinstance(self.keep, Sequence) and not self.keep:
            raise ValueError("`keep` must name at least one site pattern, got none; None keeps all sites")
        for name in ("draws_on_disk", "checkpoint"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise ValueError(f"`{name}` must be a directory or None, got {value!r}")
            if value is not None and Path(value).exists() and not Path(value).is_dir():
                raise ValueError(f"`{name}` must be a directory, but {value} is a file")

    def compile_option(self) -> CompileOption:
        """As asked for, but "auto" does not compile for a run that its time limit ends within a minute."""
        limited = self.max_seconds is not None and self.max_seconds < _COMPILE_ABOVE_SECONDS
        return False if self.compile == "auto" and limited else self.compile

    # -- before the chains run ---------------------------------------------------------------------------------------

    def warn_of_one_chain(self, run: Run) -> None:
        """Say before the sampling, not after, that a single chain cannot be judged.

        Args:
            run: Receives the warning.
        """
        for sign in single_chain_signs(self.num_chains):
            run.warn(ConvergenceWarning, sign)

    def recording(self, target: Target) -> Recording:
        """What is kept of each chain.

        Args:
            target: The target.

        Returns:
            The settings of a :class:`~inference.mcmc.recording.Recorder`.
        """
        checkpoint = None if self.checkpoint is None else Path(self.checkpoint)
        return Recording(
            self.num_samples,
            self.thinning,
            matching_sites(target.sites, self.keep),
            self._probe(target),
            checkpoint if self.draws_on_disk is None else Path(self.draws_on_disk),
            checkpoint,
            checkpoint is not None,
        )

    def _probe(self, target: Target) -> Any:
        if self.probe_inputs is None:
            return None
        x = check_new_inputs(target, self.probe_inputs)
        family = target.family(x)

        def probe(theta: Tensor) -> Tensor:
            params = target.parameters(theta, x)
            return location(family, {name: value.unsqueeze(0) for name, value in params.items()})[0]

        return probe

    def open_checkpoint(
        self,
        target: Target,
        run: Run,
        starts: Tensor,
        tensors: Mapping[str, Tensor] | None = None,
        chains_per_block: int | None = None,
    ) -> Checkpoint | None:
        """Claim the checkpoint directory for this fit, before anything is sampled.

        Args:
            target: The target.
            run: Seed of the fit.
            starts: Starting points, (C, P).
            tensors: Tensors that the settings hold, told apart by their values.
            chains_per_block: Chains that one call advances; that of the fit that was here before stays.

        Returns:
            The checkpoint, or None where none is asked for.

        Raises:
            ValueError: If the directory belongs to another fit.
        """
        directories = [None if d is None else Path(d) for d in (self.checkpoint, self.draws_on_disk)]
        if directories[0] is None:
            refuse_leftovers(*directories)
            return None
        checkpoint = Checkpoint(directories[0], self.checkpoint_every)
        if not checkpoint.exists:
            refuse_leftovers(*directories)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
        given = dict(tensors or {})
        if self.probe_inputs is not None:
            leaves = pytree.tree_leaves(self.probe_inputs)
            given.update({f"probe.{i}": leaf for i, leaf in enumerate(leaves)})
        identity = {**identify(target, self, run.seed, settings, given), "chains_per_block": chains_per_block or 0}
        checkpoint.chains_per_block = checkpoint.claim(identity, target, starts)["chains_per_block"]
        asked = settings.get("chains_per_block")
        if asked not in (None, checkpoint.chains_per_block):
            raise ValueError(
                f"the checkpoint in {self.checkpoint} was written with "
                f"`chains_per_block`={checkpoint.chains_per_block}, got {asked}: rounding would differ; use the old "
                "value, or start again in another directory"
            )
        return checkpoint

    # -- when they have run ------------------------------------------------------------------------------------------

    def posterior_of(
        self, target: Target, run: Run, recorder: Recorder, dtypes: Mapping[str, torch.dtype]
    ) -> DrawsPosterior:
        """The posterior of complete or interrupted records.

        Args:
            target: The target.
            run: Cost and warnings.
            recorder: The records.
            dtypes: Of statistics that are not float64.

        Returns:
            Draws (C, S, P), or of the kept sites alone.
        """
        draws, probes = recorder.draws(), recorder.probes()
        recorder.close()
        if self.draws_on_disk is None:
            draws = draws.clone()  # the checkpoint's file may be deleted
        probes = None if probes is None else probes.clone()
        stats = recorder.stats(dtypes)
        sites = recorder.recording.sites
        common: dict[str, Any] = {"backend": self, "info": run.info, "sample_stats": stats, "probe_values": probes}
        if sites is None:
            return DrawsPosterior(target, draws, **common)
        return PartialDrawsPosterior(target, draws, kept=packed_sites(sites), **common)

    def report_stop(self, run: Run, stopped: str, kept: int, warmed_up: int) -> None:
        """Warn that a run ended early, or raise if there is no draw to return.

        Args:
            run: Receives the warning.
            stopped: What ended it.
            kept: Draws that every chain has.
            warmed_up: Warm-up iterations of the slowest chain.

        Raises:
            KeyboardInterrupt: If Ctrl-C came before every chain had a draw.
            TimeoutError: If ``max_seconds`` passed before every chain had a draw.
        """
        later = "" if self.checkpoint is None else f"; the same fit goes on from {self.checkpoint}"
        if kept == 0:
            error = KeyboardInterrupt if stopped == "an interrupt" else TimeoutError
            raise error(
                f"{stopped} ended the run before every chain had a draw: the slowest had done {warmed_up} of "
                f"{self.warmup_steps} warm-up iterations; allow more time or shorten `warmup_steps`{later}"
            )
        run.warn(
            ConvergenceWarning,
            f"{stopped} ended the run after {kept} of {self.num_samples // self.thinning} draws a chain{later}",
        )


def warn_of_divergences(run: Run, stats: dict[str, Tensor], advice: str) -> None:
    """Warn if draws diverged.

    Args:
        run: Keeps the warning.
        stats: Sample statistics with "diverging" (C, S).
        advice: What to do.
    """
    diverging = int(stats["diverging"].sum())
    if diverging:
        total = stats["diverging"].numel()
        run.warn(
            DivergenceWarning,
            f"{diverging} of {total} draws diverged ({100 * diverging / total:.3g} %): the posterior has regions "
            f"that these draws miss; {advice}",
        )
