"""Pyro's own MCMC kernels on the same model: exact, slow, and the twin that our samplers are tested against.

The model runs through Pyro's handlers at every leapfrog step, one chain after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.infer.mcmc
import torch
from torch import Tensor

from inference.backend import Backend, Run, check_integer
from inference.bridges.pyro_guide import conditioned_model
from inference.errors import ConvergenceWarning, DivergenceWarning, NonFiniteError
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target
from inference.tracing import isolated
from inference.warning_signs import refuse_one_chain, single_chain_signs


@dataclass(frozen=True)
class PyroMCMC(Backend):
    """Pyro's MCMC with one of its kernels.

    Attributes:
        kernel: Name or class of a kernel of ``pyro.infer.mcmc``: "NUTS", "HMC", "RandomWalkKernel".
        options: Keyword arguments of the kernel, such as ``{"max_tree_depth": 6}``.
        num_samples: Draws per chain.
        warmup_steps: Warm-up draws per chain.
        num_chains: Number of chains, run one after another; at least 2 unless ``allow_one_chain``.
        allow_one_chain: Take ``num_chains=1``, which no R-hat can vouch for, with a warning instead of an error.
    """

    kernel: str | Callable[..., Any] = "NUTS"
    options: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int = 1000
    warmup_steps: int = 1000
    num_chains: int = 2
    allow_one_chain: bool = False

    family: ClassVar[str] = "bridges"
    bias: ClassVar[str] = "asymptotically exact; runs at Pyro's speed"
    reference: ClassVar[str] = "Bingham et al. 2019"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"chains"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_samples", "num_chains")
        check_integer(self, "warmup_steps", minimum=0)
        refuse_one_chain(self.num_chains, self.allow_one_chain)
        if not isinstance(self.kernel, str) and not callable(self.kernel):
            raise TypeError(f"`kernel` must be a name or a class of pyro.infer.mcmc, got {self.kernel!r}")
        if isinstance(self.kernel, str) and not hasattr(pyro.infer.mcmc, self.kernel):
            raise ValueError(f"pyro.infer.mcmc has no {self.kernel!r}; try 'NUTS', 'HMC' or 'RandomWalkKernel'")
        name = getattr(self.kernel, "__name__", "")
        if getattr(pyro.infer.mcmc, name, None) is self.kernel:
            object.__setattr__(self, "kernel", name)  # so that the repr re-creates it

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Run the chains.

        Args:
            target: The target.
            run: The run.

        Returns:
            Draws, (C, S, P).

        Raises:
            NonFiniteError: If the log density is not finite at a starting point.
        """
        for sign in single_chain_signs(self.num_chains):
            run.warn(ConvergenceWarning, sign)
        starts = target.initial(self.num_chains, run.seed, run.init)
        for chain, start in enumerate(starts):
            if not torch.isfinite(value := target.log_density(start)):
                raise NonFiniteError(
                    f"chain {chain}, step 0: the log density is {float(value)}; check model and data, or pass `init`"
                )
        chains, divergences = [], 0
        with run.bar(self.num_chains, "PyroMCMC chains") as bar:
            for chain, start in enumerate(starts):
                draws, bad = self._chain(target, start, run, run.seed + 104_729 * chain)
                chains.append(draws)
                divergences += bad
                bar.advance()
        run.info.extra["divergences"] = divergences
        if divergences:
            run.warn(DivergenceWarning, f"{divergences} of {self.num_samples * self.num_chains} draws diverged")
        return DrawsPosterior(target, torch.stack(chains), backend=self, info=run.info)

    def _chain(self, target: Target, start: Tensor, run: Run, seed: int) -> tuple[Tensor, int]:
        make = getattr(pyro.infer.mcmc, self.kernel) if isinstance(self.kernel, str) else self.kernel
        initial = {s.name: start[s.start : s.stop].reshape(s.unconstrained_shape) for s in target.sites}
        calls, divergences = 0, 0

        def counted(x: Any, y: Any = None) -> Any:
            nonlocal calls
            calls += 1
            return model(x, y)

        def watch(kernel: Any, _sample: Any, stage: str, _step: int) -> None:
            # Not mcmc.diagnostics(), whose effective sample sizes fail on a single draw; later the kernel is reset.
            nonlocal divergences
            if stage.startswith("Sample"):
                divergences = len(kernel.diagnostics().get("divergences", []))

        with isolated(target.dtype, target.device, seed):
            model = conditioned_model(target)
            mcmc = pyro.infer.MCMC(
                make(counted, **self.options),
                num_samples=self.num_samples,
                warmup_steps=self.warmup_steps,
                initial_params=initial,
                hook_fn=watch,
                disable_progbar=True,
            )
            mcmc.run(target.x, target.y)
            samples = mcmc.get_samples()
        run.count(calls)
        draws = target.ravel({s.name: samples[s.name] for s in target.sites})
        return draws, divergences
