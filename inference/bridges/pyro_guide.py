r"""Stochastic variational inference with any of Pyro's guides.

Maximises Pyro's own ELBO on the same model, :math:`E_q[\log p(y, \theta) - \log q(\theta)]`, and returns draws from the
guide. What it gets wrong is what the guide family gets wrong. Cost: several times that of MeanFieldVI, because the
model runs through Pyro's handlers at every step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.infer.autoguide
import pyro.optim
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.backend import Backend, Run, check_integer, check_positive
from inference.errors import NonFiniteError, UnsupportedModelError
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target
from inference.tracing import isolated


@dataclass(frozen=True)
class PyroGuideVI(Backend):
    """Pyro's SVI with an automatic (or hand-written) guide.

    Attributes:
        guide: Name or class of an autoguide of ``pyro.infer.autoguide``, or a callable from model to guide.
        num_steps: Optimisation steps, full batch.
        step_size: Learning rate of ClippedAdam, decayed to a tenth over the run.
        num_particles: ELBO samples per step.
        num_samples: Draws taken from the fitted guide.
    """

    guide: str | Callable[..., Any] = "AutoNormal"
    num_steps: int = 2000
    step_size: float = 0.01
    num_particles: int = 1
    num_samples: int = 1000

    family: ClassVar[str] = "bridges"
    bias: ClassVar[str] = "that of the guide family; full batch; runs at Pyro's speed"
    reference: ClassVar[str] = "Bingham et al. 2019"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"log_evidence"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_steps", "num_particles", "num_samples")
        check_positive(self, "step_size")
        if not isinstance(self.guide, str) and not callable(self.guide):
            raise TypeError(f"`guide` must be a name, a class or a callable from model to guide, got {self.guide!r}")
        if isinstance(self.guide, str) and self.guide not in _guides():
            raise ValueError(f"pyro.infer.autoguide has no {self.guide!r}; known: {', '.join(_guides())}")
        name = getattr(self.guide, "__name__", "")
        if getattr(pyro.infer.autoguide, name, None) is self.guide:
            object.__setattr__(self, "guide", name)  # so that the repr re-creates it

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Train the guide and draw from it.

        Args:
            target: The target.
            run: The run.

        Returns:
            Draws, (1, S, P); the log evidence is the ELBO.

        Raises:
            NonFiniteError: If the ELBO stops being finite.
        """
        start = target.unravel(target.initial(1, run.seed, run.init)[0])
        with isolated(target.dtype, target.device, run.seed):
            pyro.clear_param_store()
            model = conditioned_model(target)
            guide = self._make(model, start)
            decay = 0.1 ** (1 / self.num_steps)
            optimiser = pyro.optim.ClippedAdam({"lr": self.step_size, "lrd": decay})
            elbo = pyro.infer.Trace_ELBO(num_particles=self.num_particles)
            svi = pyro.infer.SVI(model, guide, optimiser, elbo.loss, loss_and_grads=_gradients_of_guide(elbo))
            with run.bar(self.num_steps, "PyroGuideVI") as bar:
                for step in range(self.num_steps):
                    loss = float(torch.as_tensor(svi.step(target.x, target.y)))
                    if not math.isfinite(loss):
                        raise NonFiniteError(
                            f"the ELBO is {-loss} at step {step}; lower `step_size`, now {self.step_size}"
                        )
                    run.count(self.num_particles)
                    bar.advance(elbo=-loss)
            bound = pyro.infer.Trace_ELBO(num_particles=100)
            with torch.no_grad():
                evidence = -float(torch.as_tensor(bound.loss(model, guide, target.x, target.y)))
                draws = torch.stack([self._draw(guide, target) for _ in range(self.num_samples)])
        point = bool((draws == draws[0]).all())  # a delta has no entropy, so its "ELBO" bounds nothing
        run.info.extra["elbo"] = None if point else evidence
        return DrawsPosterior(target, draws[None], backend=self, info=run.info, log_evidence=run.info.extra["elbo"])

    def _make(self, model: Any, start: dict[str, Tensor]) -> Any:
        make = getattr(pyro.infer.autoguide, self.guide) if isinstance(self.guide, str) else self.guide
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # flows announce that they make no use of it
                return make(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values=start))
        except TypeError:  # a guide without a starting point
            return make(model)

    @staticmethod
    def _draw(guide: Any, target: Target) -> Tensor:
        trace = poutine.trace(guide).get_trace(target.x, target.y)
        return target.ravel({s.name: trace.nodes[s.name]["value"] for s in target.sites}).reshape(-1)


def conditioned_model(target: Target) -> Any:
    """The model with the sites that a restricted target fixes held at their values."""
    if target.entries is not None:
        raise UnsupportedModelError(
            "Pyro's own guides and kernels move whole sites, not single entries of them; give `Subset` site name "
            "patterns, or choose another backend"
        )
    free = {s.name for s in target.sites}
    fixed = target.at if target.at is not None else torch.zeros(target.full_dim, dtype=target.dtype)
    values = {s.name: s.constrain(fixed[s.start : s.stop]) for s in target.all_sites if s.name not in free}
    return _ConstantParameters()(poutine.condition(target.model, data=values))


class _ConstantParameters(Messenger):
    """Keeps a module's plain parameters, which are constants here, out of the parameter store and of SVI's reach."""

    def _pyro_param(self, msg: Any) -> None:
        msg["value"], msg["done"], msg["stop"] = msg["args"][1].detach(), True, True


def _gradients_of_guide(elbo: Any) -> Callable[..., float]:
    # SVI's own backward pass would leave gradients in every tensor that the model closes over.
    def loss_and_grads(model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered")  # an ELBO that is not finite is an error of ours
            loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(inputs=[value for _, value in pyro.get_param_store().named_parameters()])
        return loss.item()

    return loss_and_grads


def _guides() -> list[str]:
    return [n for n in dir(pyro.infer.autoguide) if n.startswith("Auto")]
