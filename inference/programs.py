"""Recorded graphs of one model, by kind and by shape of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from inference.data import Tree, map_tree, num_data, shapes
from inference.errors import UnsupportedModelError
from inference.graph import Captured, capture, mutating_nodes, outside_transforms, random_nodes
from inference.observation import LikelihoodFamily, family_of, parameter_tensors
from inference.sites import Site
from inference.tracing import Terms, TracedModel, isolated


class Programs:
    """Recorded graphs of one model, by kind and by shape of the inputs; shared by all targets made from it."""

    def __init__(self, traced: TracedModel) -> None:
        self.traced = traced
        self.cache: dict[tuple[Any, ...], Captured] = {}
        self.families: dict[tuple[Any, ...], LikelihoodFamily] = {}
        # Steps of samplers, by what tells their densities apart: a second fit need not record or compile them again.
        self.steps: dict[tuple[Any, ...], dict[Any, Captured]] = {}

    def terms(self, theta: Tensor, x: Tree, y: Tensor | None) -> Terms:
        """Run the model through Pyro at a full theta."""
        values = {s.name: s.constrain(piece) for s, piece in self.pieces(theta)}
        return self.traced.run(values, x, y)

    def pieces(self, theta: Tensor) -> list[tuple[Site, Tensor]]:
        """Every site with its part of a full theta; one split, whose gradient is one concatenation."""
        parts = theta.split([s.size for s in self.traced.sites], -1)
        return list(zip(self.traced.sites, parts, strict=True))

    def joint(self, theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior with Jacobians, (), and log-likelihood per datum, (B,); recorded on first use."""
        theta, x, y = theta.contiguous(), map_tree(Tensor.contiguous, x), y.contiguous()  # as they were recorded
        return self._get("joint", self._joint, theta, x, y)(theta, x, y)

    def parameters(self, theta: Tensor, x: Tree) -> dict[str, Tensor]:
        """Parameters of the observed distribution, each (B, ...); recorded on first use."""
        theta, x = theta.contiguous(), map_tree(Tensor.contiguous, x)
        return self._get("parameters", self._parameters, theta, x)(theta, x)

    def recorded_parameters(self, x: Tree) -> fx.GraphModule:
        """Graph behind :meth:`parameters` for inputs of this shape."""
        zero = torch.zeros((), dtype=self.traced.dtype, device=self.traced.device)
        return self._get("parameters", self._parameters, zero, x).module

    def family(self, theta: Tensor, x: Tree) -> LikelihoodFamily:
        """Class of the observed distribution at inputs of this shape."""
        key = shapes(x)
        if key not in self.families:
            program = self._get("parameters", self._parameters, theta, x)
            names = list(self._names)
            outputs = next(n for n in program.module.graph.nodes if n.op == "output").args[0]
            source = next(n for n in program.module.graph.nodes if n.op == "placeholder")
            varying = frozenset(n for n, out in zip(names, outputs, strict=True) if _reads(out, source))

            def describe() -> LikelihoodFamily:
                zero = torch.zeros(self.dim, dtype=self.traced.dtype, device=self.traced.device)
                with isolated(self.traced.dtype, self.traced.device):
                    return family_of(self.terms(zero, _like(x), None).observed, varying)

            self.families[key] = outside_transforms(describe)
        return self.families[key]

    def any_joint(self) -> fx.GraphModule | None:
        """A graph behind :meth:`joint` for inputs of any shape, if one was recorded."""
        return next((c.module for key, c in self.cache.items() if key[0] == "joint"), None)

    @property
    def dim(self) -> int:
        """Number of entries of a full theta."""
        return self.traced.sites[-1].stop

    def _joint(self, theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        terms = self.terms(theta, x, y)
        jacobian = torch.stack([s.log_abs_det_jacobian(piece) for s, piece in self.pieces(theta)]).sum()
        return terms.log_prior + jacobian, terms.log_likelihood

    def _parameters(self, theta: Tensor, x: Tree) -> dict[str, Tensor]:
        return self._described(self.terms(theta, x, None).observed, x)

    def _observed(self, theta: Tensor, x: Tree, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters of the observed distribution, and the log-likelihood per datum, (B,)."""
        terms = self.terms(theta, x, y)
        return self._described(terms.observed, x), terms.log_likelihood

    def _described(self, observed: Any, x: Tree) -> dict[str, Tensor]:
        if tuple(observed.batch_shape) != (num_data(x),):
            raise UnsupportedModelError(
                f"the observed site {self.traced.observed!r} has batch shape {tuple(observed.batch_shape)} at "
                f"{num_data(x)} "
                "inputs; the data plate must be its leftmost dimension (give it the most negative `dim`)"
            )
        found = parameter_tensors(observed)
        self._names = tuple(sorted(found))
        return {name: found[name] for name in self._names}

    def _get(self, kind: str, fn: Callable[..., Any], theta: Tensor, x: Tree, *rest: Tensor) -> Captured:
        key = (kind, shapes((x, *rest)), theta.device)
        if key not in self.cache:
            self._refuse_local(x)

            def record() -> Captured:
                example = torch.zeros(self.dim, dtype=self.traced.dtype, device=self.traced.device)
                with isolated(self.traced.dtype, self.traced.device):
                    return capture(fn, example, _like(x), *(_like(r) for r in rest), final=False)

            captured = outside_transforms(record)
            _refuse_impure(captured)
            if kind == "joint":
                self._refuse_data_in_prior(captured, x)
            self.cache[key] = captured
        return self.cache[key]

    def _refuse_data_in_prior(self, captured: Captured, x: Tree) -> None:
        inputs = [n for n in captured.module.graph.nodes if n.op == "placeholder"][1:]
        prior = next(n for n in captured.module.graph.nodes if n.op == "output").args[0][0]
        if num_data(x) != self.traced.num_data and any(_reads(prior, node) for node in inputs):
            raise UnsupportedModelError(
                "a `pyro.factor` or prior outside the data plate depends on the data, so minibatches would not "
                "add up; put it "
                f"inside `with pyro.plate({self.traced.data_plate!r}, ...)`, or use batch_size=None"
            )

    def _refuse_local(self, x: Tree) -> None:
        if self.traced.local_sites and num_data(x) != self.traced.num_data:
            raise UnsupportedModelError(
                f"site {self.traced.local_sites[0]!r} has one value per datum ({self.traced.num_data} of them), "
                "so minibatches and "
                "predictions at new inputs are not defined; use batch_size=None, or make the site global"
            )


def _like(x: Tree) -> Tree:
    """Plain tensors of the same shapes and dtypes; zeros, so that class labels and token ids stay in range."""
    return map_tree(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device), x)


def _reads(out: Any, source: fx.Node) -> bool:
    """Whether an output of a graph depends on a node."""
    pending, seen = [out], set()
    while pending:
        node = pending.pop()
        if node is source:
            return True
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return False


def _refuse_impure(captured: Captured) -> None:
    drawn, written = random_nodes(captured.module), mutating_nodes(captured.module)
    if drawn:
        raise UnsupportedModelError(
            f"the model draws random numbers outside `pyro.sample` ({', '.join(sorted(set(drawn)))}); switch "
            "dropout off with "
            "`.eval()`, or make the noise a latent site"
        )
    if written:
        raise UnsupportedModelError(
            f"the model changes its own buffers while it runs ({', '.join(sorted(set(written)))}), as batch norm "
            "in training mode "
            "does; call `.eval()` on the network first"
        )
