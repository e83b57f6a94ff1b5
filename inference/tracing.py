"""The only file that runs Pyro: discover the sites of a model, refuse what cannot be compiled, evaluate its terms.

Nothing here draws random numbers once the sites are known, and neither Pyro's parameter store nor the global random
state is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from inference.data import Tree, index, num_data
from inference.errors import UnsupportedModelError
from inference.observation import unwrap
from inference.refusals import (
    check_support,
    find_observed,
    is_deterministic,
    is_factor,
    is_latent,
    is_plate,
    refuse_changes,
    refuse_intractable_priors,
    refuse_messages,
    refuse_mutating_modules,
)
from inference.sites import Site, data_frame, find_data_plate, find_sites

Model = Callable[..., Any]

# A prime, which is no layer's width: the plate of this size is the data's.
_FEW_ROWS = 61

_DECISION = (
    "the model takes a Python decision on a latent value or on the data (`if`, `float()`, `.item()`, "
    "`.tolist()`, NumPy), so its "
    "density is not one fixed graph; write the branch with torch.where or a mixture distribution"
)


@dataclass
class Terms:
    """What one run of the model says.

    Attributes:
        log_prior: Log density of the latent values, without Jacobians, plus global factors; () nats.
        log_likelihood: Per datum, (B,) nats.
        observed: Distribution of the observed site with batch shape (B,).
    """

    log_prior: Tensor
    log_likelihood: Tensor
    observed: Any


@dataclass
class _Recorder(Messenger):
    """Pyro handler that feeds values to latent sites and keeps every message."""

    values: dict[str, Tensor] | None
    observed: str | None
    device: torch.device
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def _pyro_sample(self, msg: Any) -> None:
        if self.values is not None and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        elif msg["name"] == self.observed and not msg["is_observed"]:
            # a placeholder, so that nothing is drawn
            msg["value"] = torch.zeros(msg["fn"].shape(), device=self.device)
            msg["done"] = True
        elif self.values is None and is_latent(msg) and msg["value"] is None:
            # priors written in another dtype than the data's (PyroSample on a float32 module) must not clash with x
            value = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["value"] = value.to(torch.get_default_dtype()) if value.is_floating_point() else value
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.messages.append(dict(msg))

    def _pyro_post_param(self, msg: Any) -> None:
        self.messages.append(dict(msg))


@contextmanager
def _full_plates(batch: int, data_plate: str | None, device: torch.device) -> Iterator[set[str]]:
    """Make the data plate cover the whole batch it is given: scaling by N/B is the backend's affair.

    Until the data plate is known, every plate that subsamples is taken for it.

    Yields:
        Names of the plates that subsample.
    """
    found: set[str] = set()

    def subsample(
        name: str, size: int | None = None, subsample_size: int | None = None, subsample: Any = None, *rest: Any
    ) -> tuple[int, int, Tensor | None]:
        if size is None:
            return -1, -1, None
        drawn = subsample is not None or (subsample_size is not None and subsample_size < size)
        found.update([name] if drawn else [])
        is_data = drawn if data_plate is None else name == data_plate
        total = batch if is_data else int(size)
        return total, total, torch.arange(total, device=device)

    with mock.patch.object(SubsampleMessenger, "_subsample", staticmethod(subsample)):
        yield found


def _no_validation(self: Any, value: Tensor) -> None:
    """Stands in for the check of a value against a support."""


@contextmanager
def isolated(dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Iterator[None]:
    """Run Pyro without a trace: validation off, own parameter store, own random state, the data's dtype."""
    default = torch.get_default_dtype()
    device = torch.device(device)
    accelerators = [device] if device.type == "cuda" else []
    # The store's scope restores it afterwards; validation would take decisions on tensor values. Distributions made
    # outside (PyroSample priors) that went through `expand` remember that it was on, hence the patch.
    with (
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        mock.patch.object(torch.distributions.Distribution, "_validate_sample", _no_validation),
        torch.random.fork_rng(devices=accelerators),
    ):
        # not torch.manual_seed, which reaches every accelerator, nor pyro.set_rng_seed, which reaches NumPy
        torch.default_generator.manual_seed(seed)
        if accelerators:
            torch.cuda.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


class TracedModel:
    """A Pyro callable with its sites known.

    Args:
        model: Callable ``model(x, y=None)``.
        x: Inputs, every leaf of shape (N, ...).
        y: Targets, (N, ...).
        dtype: Floating dtype of theta.
        batch_size: Data per step, for which the model has to run; None for all. With fewer than all, the sites are
            looked for on a few rows, where that says as much: a forward pass of all data may need much memory.

    Raises:
        UnsupportedModelError: If the model cannot be compiled.
    """

    def __init__(self, model: Model, x: Tree, y: Tensor, dtype: torch.dtype, *, batch_size: int | None = None) -> None:
        self.model = model
        self.dtype = dtype
        self.device = y.device
        self.num_data = num_data(x)
        self.data_plate: str | None = None
        refuse_mutating_modules(model)
        with isolated(dtype, self.device), torch.no_grad():
            first = None
            if min(self.num_data, batch_size or 0) > _FEW_ROWS:
                first = self._discovered_on_few(x, y)
            first = first or self._discovered(x, y, y)
            self.rows_of_all_sites = self._compared(x, y)
        refuse_intractable_priors(first)

    def _discovered(self, x: Tree, y: Tensor, all_y: Tensor) -> list[dict[str, Any]]:
        """Messages of a first run on some rows, after it has found the sites and checked all targets."""
        self.data_plate = None
        first = self._record(None, None, x, y)
        message = find_observed(first)
        self.observed: str = message["name"]
        self.data_plate = find_data_plate(message, num_data(x), y.dim())
        check_support(message if all_y is y else {**message, "value": all_y})
        refuse_messages(first)
        if self._drawn - {self.data_plate}:  # from here on, the data plate alone covers the batch
            first = self._record(None, None, x, y)
        self.sites: tuple[Site, ...] = find_sites(first, self.data_plate)
        return first

    def _discovered_on_few(self, x: Tree, y: Tensor) -> list[dict[str, Any]] | None:
        """The same on a few rows; None where only all rows can tell."""
        few = slice(0, _FEW_ROWS)
        some = y[few]
        try:
            first = self._discovered(index(x, few), some, y)
        except Exception:  # whatever is wrong, the run on all rows says it about all rows
            return None
        message = find_observed(first)
        # The support was checked only if the model observes y as it is, and if the support is the same for every row.
        whole = message["value"] is some and not isinstance(unwrap(message["fn"])[0], dist.Binomial)
        return first if whole and not self.local_sites else None

    @property
    def local_sites(self) -> list[str]:
        """Names of the latent sites with one value per datum."""
        return [s.name for s in self.sites if s.local]

    def _compared(self, x: Tree, y: Tensor) -> slice:
        """Compare the sites with those of other runs; the fewest rows that draw them all."""
        two = slice(0, 2)  # not one, where a model's squeeze() would bite
        try:
            again = find_sites(self._record(None, None, index(x, two), y[two]), self.data_plate)
        except Exception:
            again = ()  # the model may hold an array of all N rows
        if not self.local_sites and [(s.name, s.shape) for s in again] == [(s.name, s.shape) for s in self.sites]:
            refuse_changes(self.sites, again)
            return two
        for _ in range(2):  # sites may come and go in turn
            refuse_changes(self.sites, find_sites(self._record(None, None, x, y), self.data_plate))
        return slice(None)

    def _record(self, values: dict[str, Tensor] | None, observed: str | None, x: Tree, y: Any) -> list[dict[str, Any]]:
        recorder = _Recorder(values, observed, self.device)
        with _full_plates(num_data(x), self.data_plate, self.device) as self._drawn, recorder:
            self.model(x, y)
        return recorder.messages

    def prior_values(self, x: Tree, y: Tensor, seed: int, num: int) -> list[dict[str, Tensor]]:
        """Draw latent values from the prior.

        Args:
            x: Inputs.
            y: Targets (only their shape matters).
            seed: Random seed.
            num: Number of draws.

        Returns:
            One dict of constrained values by site name per draw.
        """
        names = {s.name for s in self.sites}
        draws = []
        with isolated(self.dtype, self.device, seed % 2**63), torch.no_grad():
            for _ in range(num):
                messages = self._record(None, None, x, y)
                draws.append({m["name"]: m["value"] for m in messages if m["name"] in names})
        return draws

    def run(self, values: dict[str, Tensor], x: Tree, y: Tensor | None) -> Terms:
        """Evaluate the model at given latent values, inside :func:`isolated`; differentiable, free of randomness.

        Args:
            values: Constrained value of every latent site.
            x: Inputs, every leaf (B, ...).
            y: Targets (B, ...), or None for the predictive distribution only.

        Returns:
            The terms of the joint density; without targets only the observed distribution, and zeros.

        Raises:
            UnsupportedModelError: If the model takes decisions on latent values.
        """
        try:
            messages = self._record(values, self.observed, x, y)
        except UnsupportedModelError:
            raise
        except Exception as error:
            if _is_decision(error):
                raise UnsupportedModelError(_DECISION) from error
            if y is None:
                raise UnsupportedModelError(
                    f"the model cannot run without targets, which predictions need: model(x, None) raised "
                    f"{type(error).__name__}: {error}; take sizes from x, and pass y to `obs=` only"
                ) from error
            raise
        self._check_sites(messages)
        return _terms(messages, self, num_data(x), with_data=y is not None)

    def check_recorded(self, eager: tuple[Tensor, ...], recorded: tuple[Tensor, ...]) -> None:
        """Compare a run of the model with its graph, at a theta other than the one recorded.

        Args:
            eager: Terms from the model itself.
            recorded: The same from the graph.

        Raises:
            UnsupportedModelError: If they differ: some number that depends on theta was recorded as a constant.
        """
        tolerance = 1e-8 if self.dtype == torch.float64 else 1e-2
        for a, b in zip(eager, recorded, strict=True):
            size = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + size), equal_nan=True):
                raise UnsupportedModelError(_DECISION)

    def _check_sites(self, messages: list[dict[str, Any]]) -> None:
        expected = {s.name for s in self.sites}
        found = {m["name"] for m in messages if is_latent(m)} - {self.observed}
        if found != expected:
            raise UnsupportedModelError(
                f"the model's sites change between runs: site {min(found ^ expected)!r} is not in all of them; "
                "every run must "
                "have the same sites, with and without y"
            )
        if self.observed not in {m["name"] for m in messages}:
            raise UnsupportedModelError(
                f"the observed site {self.observed!r} is missing from a run without targets, which predictions "
                "need; write "
                f"pyro.sample({self.observed!r}, ..., obs=y) whether or not y is None"
            )


def _is_decision(error: Exception) -> bool:
    """Whether recording failed because Python asked for the value of a tensor."""
    text = str(error).lower()
    return "tracing tensor" in text or "data-dependent" in text or "proxytensor" in text or "faketensor" in text


def _terms(messages: list[dict[str, Any]], traced: TracedModel, batch: int, *, with_data: bool) -> Terms:
    log_prior = torch.zeros((), device=traced.device)
    log_likelihood = torch.zeros(batch, device=traced.device)
    fn = None
    latent = {s.name for s in traced.sites}
    for msg in messages:
        if msg["type"] != "sample" or is_plate(msg) or is_deterministic(msg):
            continue
        frame = data_frame(msg, traced.data_plate)
        if not with_data and msg["name"] != traced.observed:
            continue  # only the predictive distribution is asked for
        if msg["name"] in latent:
            log_prior = log_prior + _log_prob(msg).sum()
        elif msg["name"] == traced.observed:
            fn = _per_datum(msg, frame)
            if with_data:
                log_likelihood = log_likelihood + _sum_to_batch(_log_prob(msg), frame, batch)
        elif is_factor(msg):
            if frame is None:
                log_prior = log_prior + _log_prob(msg).sum()
            else:
                log_likelihood = log_likelihood + _sum_to_batch(_log_prob(msg), frame, batch)
    return Terms(log_prior, log_likelihood, fn)


def _log_prob(msg: dict[str, Any]) -> Tensor:
    return scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])


def _sum_to_batch(log_prob: Tensor, frame: Any, batch: int) -> Tensor:
    """Sum everything but the data dimension: (..., B, ...) to (B,)."""
    inner: Any = sum_rightmost(log_prob, -frame.dim - 1)
    return inner.expand(inner.shape[:-1] + (batch,)).reshape(-1, batch).sum(0)


def _per_datum(msg: dict[str, Any], frame: Any) -> Any:
    """The observed distribution with batch shape (B,): plates right of the data plate become event dimensions."""
    inner = -frame.dim - 1
    return msg["fn"].to_event(inner) if inner else msg["fn"]
