r"""Chains that advance in lock step: one recorded call moves all of them, and no chain waits for a decision of another.

What :class:`~inference.mcmc.chains.Ensemble` does for chains of their own pace, this file does for methods in which
every chain takes the same number of steps at the same time. All randomness is drawn outside the recorded graph, each
chain's from its own stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.backend import Bar, Run, stacked
from inference.errors import NonFiniteError
from inference.graph import CompileOption
from inference.mcmc.chain_backend import STREAM, ChainBackend
from inference.mcmc.checkpoint import Checkpoint, check_draws
from inference.mcmc.hamiltonian import blame, precise_log_density
from inference.mcmc.recording import Recorder
from inference.posterior import DrawsPosterior
from inference.target import Target

# A batch of thetas (C, P) and the data, to log densities (C,) in float64 and gradients (C, P).
Gradients = Callable[..., tuple[Tensor, Tensor]]
Figures = dict[str, float]
_UNIFORMS = 256
_DTYPES = {"diverging": torch.bool, "n_steps": torch.int64}


class Sampler(Protocol):
    """All chains of one method."""

    gradients: int

    @property
    def compiled(self) -> bool:
        """Whether the chains' steps went through Inductor."""
        ...

    def warm_up(self) -> Iterator[tuple[int, Figures]]:
        """Adapt; yields numbers of iterations done since the last time, and figures to show."""
        ...

    def draw(self) -> tuple[Tensor, dict[str, Tensor], Figures]:
        """The next draw of every chain (C, P), its statistics (C,) under ArviZ's names, and figures to show."""
        ...

    def report(self) -> dict[str, object]:
        """What warm-up found, for the record of the fit."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures and tensors from which :meth:`restore` goes on, once warm-up is over."""
        ...

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        ...


@dataclass(frozen=True)
class Problem:
    """What chains in lock step need to know of the target.

    Attributes:
        gradients: Log densities and gradients of all chains.
        data: Tensors it reads besides theta.
        starts: Starting points, (C, P).
        noise: Random numbers of every chain.
        compile: See :func:`inference.graph.hot`.
    """

    gradients: Gradients
    data: tuple[Tensor, ...]
    starts: Tensor
    noise: Noise
    compile: CompileOption = False

    @property
    def num_chains(self) -> int:
        """Number of chains C."""
        return self.starts.shape[0]

    @property
    def dim(self) -> int:
        """Number of entries P of theta."""
        return self.starts.shape[1]

    def at_start(self) -> tuple[Tensor, Tensor]:
        """Log densities (C,) and gradients (C, P) at the starting points.

        Returns:
            Both, finite.

        Raises:
            NonFiniteError: If one is not finite.
        """
        values, grads = self.gradients(self.starts, *self.data)
        bad = ~(torch.isfinite(values) & torch.isfinite(grads).all(-1))
        if bool(bad.any()):
            chain = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"chain {chain}, step 0: log density {float(values[chain])} or its gradient is not finite"
            )
        return values, grads


class Noise:
    """Random numbers of chains in lock step, each chain's from its own stream.

    Args:
        streams: One generator per chain.
        like: Gives dtype and device.
    """

    def __init__(self, streams: Sequence[torch.Generator], like: Tensor) -> None:
        self.streams = list(streams)
        self._like = like
        self._uniforms: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (C, *shape)."""
        out = self._like.new_empty(len(self.streams), *shape)
        for row, stream in zip(out, self.streams, strict=True):
            row.normal_(generator=stream)
        return out

    def log_uniform(self) -> Tensor:
        """Logarithms of uniform numbers in (0, 1], float64 (C,)."""
        if not self._uniforms:
            rows = [
                torch.rand(_UNIFORMS, generator=s, dtype=torch.float64, device=self._like.device) for s in self.streams
            ]
            self._uniforms = list((-torch.stack(rows, 1)).log1p())
        return self._uniforms.pop()

    def state(self) -> dict[str, Tensor]:
        """Tensors from which :meth:`restore` goes on."""
        unused = torch.stack(self._uniforms) if self._uniforms else torch.zeros(0, dtype=torch.float64)
        return {"streams": torch.stack([s.get_state() for s in self.streams]), "uniforms": unused}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        for stream, state in zip(self.streams, tensors["streams"], strict=True):
            stream.set_state(state.cpu().clone())
        self._uniforms = list(tensors["uniforms"].to(self._like.device))


def batched_gradients(log_density: Callable[..., Tensor], num_chains: int, *, together: bool = True) -> Gradients:
    """Log density and gradient of several thetas.

    Args:
        log_density: Function of theta (P,) and data, () nats; float64 if energies need it.
        num_chains: Number C of thetas.
        together: Batch them, or take one after another (large networks).

    Returns:
        Function of thetas (C, P) and data, to log densities (C,) in float64 and gradients (C, P).
    """
    one = grad_and_value(log_density)

    def gradients(theta: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        if together and num_chains > 1:
            grad, value = vmap(one, in_dims=(0, *(None for _ in data)))(theta, *data)
            return value.double(), grad
        pairs = [one(theta[c], *data) for c in range(num_chains)]
        return torch.stack([v for _, v in pairs]).double(), torch.stack([g for g, _ in pairs])

    return gradients


class Group:
    """The sampler and its records as one unit of a checkpoint.

    Args:
        sampler: All chains.
        recorder: Receives their draws.
        num_draws: Draws S a chain.
    """

    def __init__(self, sampler: Sampler, recorder: Recorder, num_draws: int) -> None:
        self.sampler, self.recorder, self.num_draws = sampler, recorder, num_draws
        self.after_stage: Callable[[], None] = lambda: None

    @property
    def iterations(self) -> int:
        """Draws so far."""
        return self.recorder.num_kept

    @property
    def done(self) -> bool:
        """Whether all draws are there."""
        return self.iterations >= self.num_draws

    def flush(self) -> None:
        """Have the draws so far on the disk."""
        for record in self.recorder.records:
            record.flush()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures and tensors of the sampler and of every record."""
        figures, tensors = self.sampler.state()
        records = [record.state() for record in self.recorder.records]
        for c, (_, held) in enumerate(records):
            tensors |= {f"record{c}.{name}": value for name, value in held.items()}
        return {"sampler": figures, "records": [own for own, _ in records]}, tensors

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        self.sampler.restore(figures["sampler"], tensors)
        for c, record in enumerate(self.recorder.records):
            prefix = f"record{c}."
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            record.restore(figures["records"][c], held)


@torch.no_grad()
def fit_in_lockstep(
    backend: ChainBackend, target: Target, run: Run, starts: Tensor, make: Callable[[Problem], Sampler]
) -> DrawsPosterior:
    """Run chains from their starting points to a posterior.

    A checkpoint is written from the first draw on; a run that ended in its warm-up repeats it, with the same outcome.

    Args:
        backend: Lengths, what is recorded, and whom the posterior is by.
        target: Tempered target.
        run: Seed and counters of this fit.
        starts: Starting points, (C, P).
        make: The method's sampler for a problem.

    Returns:
        Draws (C, S, P) with sample statistics.

    Raises:
        NonFiniteError: If the log density is not finite at a starting point.
    """
    num = starts.shape[0]
    backend.warn_of_one_chain(run)
    checkpoint = backend.open_checkpoint(target, run, starts)
    held = {} if checkpoint is None else checkpoint.read([0])
    compile = backend.compile_option() if checkpoint is None or not held else checkpoint.compiled
    log_density, data = precise_log_density(target)
    gradients = batched_gradients(log_density, num, together=stacked(target, num, target.num_data))
    noise = Noise([run.stream(STREAM + c) for c in range(num)], starts)
    try:
        sampler = make(Problem(gradients, data, starts, noise, compile))
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; {blame(target, starts)}") from error
    # The sampler itself leaves out the steps in between.
    recording = replace(backend.recording(target), num_samples=backend.num_samples // backend.thinning, thinning=1)
    group = Group(sampler, Recorder(recording, starts), recording.num_kept)
    if checkpoint is not None:
        checkpoint.attach({0: group}, held, sampler.compiled)
        check_draws(group.recorder, checkpoint.directory)
    with run.bar(num * (backend.warmup_steps + backend.num_samples), type(backend).__name__) as bar:
        stopped, warmed_up = _advance(backend, group, bar, checkpoint)
    run.count(sampler.gradients)
    if stopped is not None:
        backend.report_stop(run, stopped, group.iterations, warmed_up)
    run.info.extra |= sampler.report()
    return backend.posterior_of(target, run, group.recorder, _DTYPES)


def _advance(backend: ChainBackend, group: Group, bar: Bar, checkpoint: Checkpoint | None) -> tuple[str | None, int]:
    """Run to the last draw, the time limit or Ctrl-C: which it was, and iterations of warm-up done."""
    sampler, num = group.sampler, backend.num_chains
    deadline = math.inf if backend.max_seconds is None else time.monotonic() + backend.max_seconds
    warmed_up = backend.warmup_steps if group.iterations else 0
    bar.advance(num * (warmed_up + group.iterations * backend.thinning))
    try:
        for done, figures in sampler.warm_up() if not group.iterations else ():
            warmed_up += done
            bar.advance(num * done, **figures)
            if time.monotonic() > deadline:
                return f"max_seconds={backend.max_seconds:g}", warmed_up
        while not group.done:
            draw, stats, figures = sampler.draw()
            group.recorder.add(draw, stats)
            group.after_stage()
            bar.advance(num * backend.thinning, **figures)
            if time.monotonic() > deadline and not group.done:
                if checkpoint is not None:
                    checkpoint.write_all()
                return f"max_seconds={backend.max_seconds:g}", warmed_up
    except KeyboardInterrupt:
        return "an interrupt", warmed_up
    return None, warmed_up
