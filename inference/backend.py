"""What every backend shares: validated hyperparameters, one way to run, progress, minibatches, the record of a fit."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from inference.data import Tree, index, map_tree
from inference.errors import ApproximationWarning, ConvergenceWarning, DivergenceWarning
from inference.graph import CompileOption, matmul_size
from inference.layout import is_view, value_of
from inference.progress import Bar, FitInfo, Measured
from inference.target import Target, compile_target

if TYPE_CHECKING:
    from inference.posterior import Posterior

__all__ = [
    "ApproximationWarning",
    "Backend",
    "Bar",
    "Batches",
    "ConvergenceWarning",
    "DivergenceWarning",
    "FitInfo",
    "Run",
    "check_integer",
    "check_positive",
    "stacked",
]

# Up to this many multiplications in one matrix product dispatches are most of the time: on 8-50-1 stacking wins five
# times. Up to the second number they are a sixth of it, which stacking saves as long as a core's cache holds the
# stacked activations and the shared one the stacked thetas with gradient and moments: 15-25 % on ten members of
# 784-200-10 at batch 100. From twice that size on nothing is left to win.
_FREE_MULTIPLICATIONS, _BUSY_MULTIPLICATIONS = 4_000_000, 20_000_000
_MOST_ACTIVATIONS, _MOST_THETAS = 250_000, 2_000_000  # elements, of all members together


@dataclass(frozen=True, kw_only=True)
class Backend:
    r"""Base of all backends: a frozen record of hyperparameters with one method, :meth:`fit`.

    Attributes:
        temperature: T of the whole energy: samples :math:`p(\theta|D)^{1/T}`; 1 is the posterior.
        likelihood_temperature: T of the likelihood alone; 1 is the posterior.
        compile: Put Inductor on the inner step: True, False, or "auto" (when the work ahead repays 2-20 s).
        progress: Show bars: True, False, or None (on a terminal only).
    """

    temperature: float = 1.0
    likelihood_temperature: float = 1.0
    compile: CompileOption = "auto"
    progress: bool | None = None

    family: ClassVar[str] = ""
    bias: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_positive(self, "likelihood_temperature")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f'`compile` must be True, False or "auto", got {self.compile!r}')
        tempered = self.temperature != 1 or self.likelihood_temperature != 1
        if tempered and "temperature" not in self.capabilities:
            raise ValueError(f"{type(self).__name__} has no temperature: {self.bias}; leave both temperatures at 1")

    def fit(self, model: Any, x: Any, y: Any = None, *, seed: int = 0, init: Any = None) -> Posterior:
        """Approximate the posterior of a model.

        Args:
            model: Any Pyro callable ``model(x, y=None)``.
            x: Inputs: tensor, or dict or tuple of tensors, first dimension N; or a DataLoader of (x, y).
            y: Targets, (N, ...).
            seed: Seed of all randomness; the global random state is not touched.
            init: Starting point: a posterior, a dict of site values, a tensor, or None.

        Returns:
            The posterior.

        Raises:
            UnsupportedModelError: If the model cannot be recorded.
            ValueError: If data or ``init`` are unusable.
        """
        target = compile_target(model, x, y, batch_size=getattr(self, "batch_size", None))
        return self.fit_to(target, seed=seed, init=init)

    def fit_to(self, target: Target, *, seed: int = 0, init: Any = None) -> Posterior:
        """Approximate the posterior of a compiled target.

        Args:
            target: The target, untempered.
            seed: Seed of all randomness.
            init: Starting point, as in :meth:`fit`.

        Returns:
            The posterior.

        Raises:
            ValueError: If ``seed`` or ``init`` is unusable.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}")
        target = target.tempered(self.temperature, self.likelihood_temperature)
        run = Run(self, target, seed, init)
        with run.measured():
            posterior = self.fit_target(target, run)
        posterior.info = run.info
        return posterior

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """The method itself; implemented by each backend.

        Args:
            target: Tempered target.
            run: Seed, starting point, progress and counters of this fit.

        Returns:
            The posterior.

        Raises:
            NotImplementedError: Here.
        """
        raise NotImplementedError

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of the hyperparameters."""
        return [f.name for f in dataclasses.fields(cls)]


class Run:
    """One fit in progress: seed, starting point, progress bars, counters.

    Args:
        backend: The backend that runs.
        target: What it runs on.
        seed: Seed of all randomness.
        init: The user's starting point, or None.

    Attributes:
        curvature: What a Laplace backend took last, for its posterior.
        slope: Where its curvature collects the log likelihood and its gradient on the way.
    """

    def __init__(self, backend: Backend, target: Target, seed: int, init: Any = None) -> None:
        self.backend = backend
        self.target = target
        self.seed = seed
        self.init = init
        self.info = FitInfo()
        self.curvature: Any = None
        self.slope: Any = None

    def stream(self, index: int = 0) -> torch.Generator:
        """Random stream of one chain, member or purpose."""
        return self.target.stream(self.seed, index)

    def streams(self, num: int) -> list[torch.Generator]:
        """The first ``num`` streams."""
        return [self.stream(i) for i in range(num)]

    def count(self, gradients: float) -> None:
        """Add gradient evaluations, in full passes over the data."""
        self.info.gradients += gradients

    def warn(self, category: type[Warning], text: str) -> None:
        """Warn now and keep the text in the record of the fit."""
        self.info.warnings.append((category.__name__, text))
        warnings.warn(text, category, stacklevel=6)

    def bar(self, total: int, description: str) -> Bar:
        """Progress bar; silent where nobody watches."""
        return Bar(total, description, self.backend.progress)

    def sub(self, backend: Backend, init: Any = None, *, target: Target | None = None, offset: int = 1) -> Run:
        """A run inside this one (a MAP start, say) whose costs are counted here as well.

        Args:
            backend: The inner backend.
            init: Its starting point.
            target: Its target; the same by default.
            offset: Keeps its random streams apart; 0 shares those of this run.

        Returns:
            The inner run.
        """
        inner = Run(backend, target or self.target, self.seed + 7919 * offset, init)
        inner.info = self.info
        return inner

    def measured(self) -> Any:
        """Context that records wall time and peak memory."""
        return Measured(self.info)


class Batches:
    """Minibatches for members that train side by side, each with its own shuffling.

    Every batch has exactly B rows (epochs follow one another without a gap), so one recorded graph serves all.

    Args:
        target: Supplies the data.
        batch_size: B, or None for the loader's, or else the full data.
        streams: One random stream per member.
    """

    def __init__(self, target: Target, batch_size: int | None, streams: Sequence[torch.Generator]) -> None:
        size = batch_size if batch_size is not None else target.batch_size
        if size is not None and size < 1:
            raise ValueError(f"`batch_size` must be >= 1, got {size}")
        self.target = target
        self.num = len(streams)
        self.full = size is None or size >= target.num_data
        self.size = target.num_data if self.full else int(size or 0)
        self._streams = list(streams)
        self._queues = [torch.empty(0, dtype=torch.long, device=target.device) for _ in streams]

    @property
    def in_dims(self) -> tuple[int | None, int | None]:
        """``vmap`` dimensions of x and y: shared by all members when the batch is the full data."""
        return (None, None) if self.full else (0, 0)

    @property
    def cost(self) -> float:
        """Full-data gradients that one step of one member counts."""
        return self.size / self.target.num_data

    def next(self) -> tuple[Tree, Tensor]:
        """The next batch: leaves (M, B, ...), or the full data (N, ...) without a member dimension."""
        if self.full:
            return self.target.x, self.target.y
        rows = self._take(0) if self.num == 1 else torch.cat([self._take(m) for m in range(self.num)])  # (M B,)

        def select(leaf: Tensor) -> Tensor:
            # copies whole rows, where indexing copies elements: eight times faster for 100 rows of 784
            return leaf.index_select(0, rows).unflatten(0, (self.num, self.size))

        return map_tree(select, self.target.x), select(self.target.y)

    def example(self) -> tuple[Tree, Tensor]:
        """Data of the shape of :meth:`next`, drawing nothing."""
        if self.full:
            return self.target.x, self.target.y
        rows = torch.zeros(self.num, self.size, dtype=torch.long, device=self.target.device)
        return index(self.target.x, rows), self.target.y[rows]

    def _take(self, member: int) -> Tensor:
        queue = self._queues[member]
        while queue.shape[0] < self.size:
            stream = self._streams[member]
            fresh = torch.randperm(self.target.num_data, generator=stream, device=self.target.device)
            queue = torch.cat([queue, fresh])
        self._queues[member] = queue[self.size :]
        return queue[: self.size]


def stacked(target: Target, num: int, batch_size: int) -> bool:
    """Whether ``num`` thetas should advance as one stacked tensor rather than in a loop.

    On a CPU small networks are bound by dispatches, so members share them; where one member's largest matrix product
    fills the core already, or all members together spill its caches, a loop is faster. Decided from the recorded graph,
    so it is the same on every run.

    Args:
        target: The model.
        num: Number of members, chains or particles.
        batch_size: Data per step and member.

    Returns:
        True to stack.
    """
    if num == 1 or target.device.type != "cpu":
        return True
    graph = target.recorded(batch_size).graph
    largest = max((matmul_size(n) for n in graph.nodes if n.op == "call_function"), default=0)
    if largest <= _FREE_MULTIPLICATIONS or largest > _BUSY_MULTIPLICATIONS:
        return largest <= _FREE_MULTIPLICATIONS
    return num * widest_activation(graph) <= _MOST_ACTIVATIONS and num * target.dim <= _MOST_THETAS


def widest_activation(graph: fx.Graph) -> int:
    """Most elements of a value that a recorded density computes from theta and the data, for one theta."""
    theta, *data = (n for n in graph.nodes if n.op == "placeholder")
    read: dict[fx.Node, set[fx.Node]] = {}  # which of theta and the data each node depends on
    widest = 0
    for node in graph.nodes:
        sources = (read[n] for n in node.all_input_nodes)
        read[node] = {node} if node.op == "placeholder" else set().union(*sources)
        value = value_of(node)
        if value is not None and theta in read[node] and not read[node].isdisjoint(data) and not is_view(node):
            widest = max(widest, value.numel())
    return widest


def check_positive(owner: Any, *names: str) -> None:
    """Raise unless the named fields are finite numbers > 0 (None passes).

    Raises:
        ValueError: Naming field and value.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"`{name}` must be > 0, got {value!r}")


def check_integer(owner: Any, *names: str, minimum: int = 1) -> None:
    """Raise unless the named fields are integers of at least ``minimum`` (None passes).

    Raises:
        ValueError: Naming field and value.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}")
