r"""Recorded tensor graphs: what a Pyro model becomes before a backend touches it.

:func:`capture` runs a function once and keeps the ATen operations it performed. What is replayed afterwards has no
Pyro, no autograd tape and no Python of ours in it, and may be vectorised or differentiated again by ``torch.func``.
:func:`hot` also hands the graph to Inductor when the work ahead repays the seconds that costs.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from inference.heap import keep_freed_memory
from inference.products import arrange_products
from inference.scaled_sums import scale_terms
from inference.simplify import simplify

logger = logging.getLogger(__name__)
aten = torch.ops.aten

T = TypeVar("T")
CompileOption = bool | Literal["auto"]

# Inductor needs 3-5 s for the graph of a small network; a call then takes a fifth to a half of the time.
_COMPILE_SECONDS = 5.0
_COMPILED_SHARE = 0.35
# With the calling code in C++ too, a call loses the 20 us that Python spends in it. The compiler has no more work, but
# one file of it where there were several, which two cores would share.
_WRAPPER_SECONDS = 1.5
_WRAPPER_SHARE = 2e-5


@dataclass(frozen=True)
class Captured:
    """A recorded function: call it like the original, with tensors of the same shapes and dtypes.

    Attributes:
        module: The recorded graph, flat tensors in and flat tensors out.
        call: What runs: the module itself or its compiled form.
        in_spec: Structure of the positional arguments.
        out_spec: Structure of the result.
        compiled: Whether ``call`` went through Inductor.
    """

    module: fx.GraphModule
    call: Callable[..., Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    compiled: bool

    @cached_property
    def plain(self) -> bool:
        """Whether arguments and result are bare tensors, so that no tree need be walked."""
        flat_in = self.in_spec == pytree.tree_structure((0,) * self.in_spec.num_leaves)
        return flat_in and (self.single or self.out_spec == pytree.tree_structure((0,) * self.out_spec.num_leaves))

    @cached_property
    def single(self) -> bool:
        """Whether the result is one tensor."""
        return self.out_spec == pytree.tree_structure(0)

    def __call__(self, *args: Any) -> Any:
        """Replay the graph on ``args`` (same structure and shapes as at capture)."""
        if self.plain and len(args) == self.in_spec.num_leaves:
            out = self.call(*args)
            return out[0] if self.single else tuple(out)
        flat, spec = pytree.tree_flatten(args)
        if spec != self.in_spec:
            raise ValueError(f"captured function expects arguments structured as {self.in_spec}, got {spec}")
        return pytree.tree_unflatten(list(self.call(*flat)), self.out_spec)


def outside_transforms(fn: Callable[[], T]) -> T:
    """Run ``fn`` as if no vmap, grad or capture surrounded it, so that a graph can be recorded from inside one.

    Transforms and dispatch modes belong to a thread, so a fresh one has none.

    Args:
        fn: What to run, without gradients.

    Returns:
        Its result.
    """

    def plainly() -> T:
        with torch.no_grad():
            return fn()

    if peek_interpreter_stack() is None and _len_torch_dispatch_stack() == 0:
        return plainly()
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(plainly).result()


def capture(fn: Callable[..., Any], *example: Any, compile: bool = False, final: bool = True) -> Captured:
    """Record ``fn`` as a graph of tensor operations.

    Args:
        fn: Function of tensors (or trees of tensors). It may use ``torch.func`` transforms inside, but draws no random
            numbers and takes no decision on tensor values.
        *example: Arguments that fix structure, shapes and dtypes; their values do not matter.
        compile: Also compile with Inductor (seconds, once); falls back to the plain graph where no compiler is found.
            The compiled call is for plain tensors: take gradients and ``vmap`` inside ``fn``, not of the result, which
            must not be differentiated.
        final: Replace slow operations by fast ones; False for a graph that is going to be differentiated, whose
            gradient is cheaper taken of the originals.

    Returns:
        A callable with the signature and the result structure of ``fn``.
    """
    flat, in_spec = pytree.tree_flatten(example)
    # New tensors: make_fx merges inputs that are one object, and what a surrounding transform wrapped must not leak in.
    templates = [(a.shape, a.dtype, a.device) for a in flat]
    flat = outside_transforms(lambda: [torch.zeros(s, dtype=t, device=d) for s, t, d in templates])
    out_specs: list[pytree.TreeSpec] = []

    def flattened(*leaves: Tensor) -> list[Any]:
        out, spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(list(leaves), in_spec)))
        out_specs.append(spec)
        return out

    def record() -> fx.GraphModule:
        keep_freed_memory()
        # One mode for the whole recording: make_fx makes a new one for every tensor otherwise, two thirds of its time.
        # Attention as plain products: the fused kernels take a seed even without dropout and have no second derivative.
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))), sdpa_kernel(SDPBackend.MATH):
            module = make_fx(flattened)(*flat)
        _detach_constants(module)
        module = _without_mutation(module, flat)
        simplify(module)
        if final:
            _rewrite(module)
            arrange_products(module, flat)
            scale_terms(module)
        return module

    module = outside_transforms(record)
    call: Callable[..., Any] = module.forward  # past nn.Module's hooks, 10 us a call
    compiled = False
    if compile:
        call, compiled = _inductor(module, flat)
    return Captured(module, call, in_spec, out_specs[0], compiled)


def hot(
    fn: Callable[..., Any],
    *example: Any,
    compile: CompileOption = "auto",
    num_calls: float = 0,
    recorded: dict[Any, Captured] | None = None,
) -> Captured:
    """Capture the inner step of a long computation, compiled where that pays.

    Args:
        fn: As in :func:`capture`.
        *example: As in :func:`capture`.
        compile: True, False, or "auto": compile if ``num_calls`` of the estimated cost outweigh the compilation.
        num_calls: How often the result is about to be called.
        recorded: What was captured of the same function before, by the layout of its arguments; used where it serves
            and added to.

    Returns:
        The captured function.
    """
    recorded = {} if recorded is None else recorded
    flat, spec = pytree.tree_flatten(example)
    key = (spec, *((a.shape, a.stride(), a.dtype, a.device) for a in flat))
    captured = recorded.get(key) or recorded.setdefault(key, capture(fn, *example))
    if compile is True or (compile == "auto" and worth_compiling(captured, num_calls)):
        key = (*key, num_calls * _WRAPPER_SHARE > _WRAPPER_SECONDS)
        if key not in recorded:
            call, compiled = _inductor(captured.module, flat, num_calls)
            recorded[key] = Captured(captured.module, call, captured.in_spec, captured.out_spec, compiled)
        return recorded[key]
    return captured


def worth_compiling(captured: Captured, num_calls: float) -> bool:
    """Whether compiling saves more than it costs; decided from shapes alone, so the same on every run."""
    saved = num_calls * estimated_seconds(captured.module) * (1 - _COMPILED_SHARE)
    return saved > _COMPILE_SECONDS and compiler_available()


def compiler_available() -> bool:
    """Whether Inductor finds a C++ compiler on this machine."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def estimated_seconds(module: fx.GraphModule) -> float:
    """Rough cost of one eager call on one core: a dispatch, the elements and the multiplications of each node."""
    total = 0.0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        numel = value.numel() if isinstance(value, Tensor) else 0
        total += 3e-6 + numel * (2.5e-9 if node.target is aten.tanh.default else 4e-10)
        total += 2.0 * matmul_size(node) / 4e10
    return total


def matmul_size(node: fx.Node) -> int:
    """Number of multiplications of a matrix product or convolution node; 0 for any other node."""
    values = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    out = node.meta.get("val")
    if not isinstance(out, Tensor) or not values:
        return 0
    if node.target in (aten.mm.default, aten.bmm.default, aten.mv.default):
        return out.numel() * values[0].shape[-1]
    if node.target is aten.addmm.default and len(values) > 1:
        return out.numel() * values[1].shape[-1]
    if node.target is aten.convolution.default and len(values) > 1:
        return out.numel() * values[1][0].numel()
    return 0


def random_nodes(module: fx.GraphModule) -> list[str]:
    """Names of the operations in a graph that draw random numbers."""
    tag = torch.Tag.nondeterministic_seeded
    return [
        str(node.target)
        for node in module.graph.nodes
        if node.op == "call_function" and tag in getattr(node.target, "tags", ())
    ]


def mutating_nodes(module: fx.GraphModule) -> list[str]:
    """Names of the operations in a graph that write into a constant, such as batch norm's running statistics."""
    found = []
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        written = [
            i for i, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write
        ]
        targets = [node.args[i] for i in written if i < len(node.args)]
        if any(isinstance(a, fx.Node) and a.op == "get_attr" for a in targets):
            found.append(str(node.target))
    return found


class _Lifted(fx.Interpreter):
    """Runs a graph with other values for its constants."""

    def __init__(self, module: fx.GraphModule, constants: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.constants = constants

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constants.get(target, super().get_attr(target, args, kwargs))


def _without_mutation(module: fx.GraphModule, flat: list[Any]) -> fx.GraphModule:
    """The same graph with in-place operations on intermediates made functional: rewriting relies on that."""
    mutable = [n for n in module.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    if not mutable or mutating_nodes(module):
        return module
    names = sorted({n.target for n in module.graph.nodes if n.op == "get_attr"})
    constants = [getattr(module, name).detach() for name in names]

    def lifted(*args: Tensor) -> Any:
        return _Lifted(module, dict(zip(names, args, strict=False))).run(*args[len(names) :])

    # functionalize leaves alone what it did not see as an input, so constants are inputs for a moment
    functional = make_fx(functionalize(lifted, remove="mutations"))(*constants, *flat)
    inputs = [n for n in functional.graph.nodes if n.op == "placeholder"]
    for name, constant, node in zip(names, constants, inputs, strict=False):
        functional.register_buffer(f"_lifted{name}", constant)
        with functional.graph.inserting_before(node):
            held = functional.graph.get_attr(f"_lifted{name}")
        held.meta["val"] = constant
        node.replace_all_uses_with(held)
        functional.graph.erase_node(node)
    functional.recompile()
    return functional


def _detach_constants(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            if isinstance(value, Tensor) and value.requires_grad:
                delattr(module, node.target)
                module.register_buffer(node.target, value.detach())


def _rewrite(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or node.target is not aten.tanh.default or not isinstance(value, Tensor):
            continue
        if value.dtype == torch.float32 and value.device.type == "cpu":
            _tanh_through_sigmoid(graph, node, value)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _tanh_through_sigmoid(graph: fx.Graph, node: fx.Node, value: Tensor) -> None:
    """Write tanh(z) as 2 sigmoid(2z) - 1: six times faster on CPUs, absolute error 2e-7 against tanh's 6e-8."""
    with graph.inserting_before(node):
        doubled = graph.call_function(aten.mul.Tensor, (node.args[0], 2.0))
        sigmoid = graph.call_function(aten.sigmoid.default, (doubled,))
        shifted = graph.call_function(aten.rsub.Scalar, (sigmoid, -1.0, -2.0))  # -1 - (-2) s, in one pass
    for new in (doubled, sigmoid, shifted):
        new.meta["val"] = value
    node.replace_all_uses_with(shifted)


def _inductor(module: fx.GraphModule, flat: list[Any], num_calls: float = 0) -> tuple[Callable[..., Any], bool]:
    if not compiler_available():
        logger.warning("no C++ compiler found: running the recorded graph without compilation")
        return module.forward, False

    def build(cpp_wrapper: bool) -> Callable[..., Any]:
        fused = fx.GraphModule(module, copy.deepcopy(module.graph))
        arrange_products(fused, list(flat), fused=True)
        for node in fused.graph.nodes:
            node.meta.pop("val", None)  # Inductor would take shapes from it, and refuses fake tensors of several modes
        # Straight to Inductor: torch.compile's guards cost 15-50 us a call, as much as a small leapfrog.
        call: Any = torch._inductor.compile(fused, list(flat), {"cpp_wrapper": cpp_wrapper})
        call(*flat)
        return call

    on_cpu = all(a.device.type == "cpu" for a in flat)
    for cpp_wrapper in (True, False) if on_cpu and num_calls * _WRAPPER_SHARE > _WRAPPER_SECONDS else (False,):
        try:
            return outside_transforms(partial(build, cpp_wrapper)), True
        except Exception as error:  # Inductor raises many types; the eager graph is always right
            instead = "trying without the C++ wrapper" if cpp_wrapper else "running the recorded graph without it"
            logger.warning("compilation failed (%s): %s", type(error).__name__, instead)
    return module.forward, False
