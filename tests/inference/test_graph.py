"""Recorded graphs against the functions they were recorded from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap

import inference.graph as graph
from inference.graph import Captured, capture, hot, mutating_nodes, random_nodes, worth_compiling

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def energy(w: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(x @ w) ** 2).sum() + nn.functional.binary_cross_entropy_with_logits(x @ w, (x[:, 0] > 0).to(x))


FUNCTIONS: list[Callable[[Tensor, Tensor], Any]] = [
    energy,
    grad(energy),
    jacrev(lambda w, x: torch.sin(x @ w)),
    lambda w, x: vmap(lambda row: torch.exp(row @ w))(x),
    lambda w, x: vmap(jacrev(grad(energy)), in_dims=(0, None))(torch.stack([w, 2 * w]), x),
    lambda w, x: {"a": x @ w, "b": (w.sum(), x.square())},
    lambda w, x: x.clone().add_(w).mul_(2.0).cumsum(0),
]


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_replay_is_the_function(fn: Callable[..., Any]) -> None:
    captured = capture(fn, torch.zeros(3), torch.zeros(5, 3))
    w, x = draw(3), draw(5, 3, seed=1)
    torch.testing.assert_close(captured(w, x), fn(w, x), **EXACT)


def test_replay_can_be_vectorised_and_differentiated() -> None:
    captured = capture(energy, torch.zeros(3), torch.zeros(5, 3), final=False)
    w, x = draw(4, 3), draw(5, 3, seed=1)
    torch.testing.assert_close(vmap(captured, (0, None))(w, x), vmap(energy, (0, None))(w, x), **EXACT)
    torch.testing.assert_close(grad(captured)(w[0], x), grad(energy)(w[0], x), **EXACT)
    tangent = (torch.ones(3), torch.zeros(5, 3))
    torch.testing.assert_close(jvp(captured, (w[0], x), tangent), jvp(energy, (w[0], x), tangent), **EXACT)
    leaf = w[0].clone().requires_grad_()
    (taken,) = torch.autograd.grad(captured(leaf, x), leaf)
    torch.testing.assert_close(taken, grad(energy)(w[0], x), **EXACT)


@pytest.mark.parametrize(
    "outer", [lambda f: vmap(f), lambda f: vmap(grad(f)), lambda f: vmap(lambda w: jvp(f, (w,), (w,)))]
)
def test_capture_works_from_inside_a_transform(outer: Callable[..., Any]) -> None:
    x = draw(5, 3, seed=1)

    def lazily(w: Tensor) -> Tensor:
        return capture(energy, torch.zeros(3), torch.zeros(5, 3), final=False)(w, x)

    w = draw(4, 3)
    torch.testing.assert_close(outer(lazily)(w), outer(lambda v: energy(v, x))(w), **EXACT)


def test_capture_works_from_inside_a_capture() -> None:
    inner_made: list[Captured] = []

    def outer(w: Tensor, x: Tensor) -> Tensor:
        inner_made.append(capture(energy, torch.zeros(3), torch.zeros(5, 3), final=False))
        return inner_made[-1](2 * w, x)

    captured = capture(outer, torch.zeros(3), torch.zeros(5, 3))
    w, x = draw(3), draw(5, 3, seed=1)
    torch.testing.assert_close(captured(w, x), energy(2 * w, x), **EXACT)
    torch.testing.assert_close(inner_made[0](w, x), energy(w, x), **EXACT)


def test_one_tensor_given_twice_stays_two_arguments() -> None:
    same = draw(3)
    captured = capture(lambda a, b: a - b, same, same)
    torch.testing.assert_close(captured(same, torch.zeros(3)), same)


def test_in_place_operations_on_twins_stay_apart() -> None:
    constant = draw(4)

    def fn(z: Tensor) -> tuple[Tensor, Tensor]:
        one, two = torch.empty_like(constant).fill_(1.0), torch.empty_like(constant).fill_(1.0)
        return one.add_(z), two.mul_(3.0).sub_(constant)

    captured = capture(fn, torch.zeros(4))
    z = draw(4, seed=2)
    torch.testing.assert_close(captured(z), fn(z), **EXACT)
    torch.testing.assert_close(captured(z), fn(z), **EXACT)  # and again: nothing was written into


def test_arguments_of_another_structure_are_refused() -> None:
    captured = capture(lambda x: x["a"] + x["b"], {"a": torch.zeros(2), "b": torch.zeros(2)})
    torch.testing.assert_close(captured({"a": torch.ones(2), "b": torch.ones(2)}), torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="captured function expects arguments structured as"):
        captured({"a": torch.ones(2)})


def test_captured_parameters_are_constants_without_a_tape() -> None:
    layer = nn.Linear(3, 2)
    captured = capture(lambda x: layer(x).sum(), torch.zeros(4, 3))
    out = captured(draw(4, 3))
    assert not out.requires_grad
    assert layer.weight.requires_grad
    torch.testing.assert_close(out, layer(draw(4, 3)).sum().detach())


def test_float32_tanh_is_rewritten_within_three_ulps() -> None:
    z = torch.linspace(-12, 12, 20001, dtype=torch.float32)
    captured = capture(torch.tanh, z)
    assert "tanh" not in {str(n.target).split(".")[1] for n in captured.module.graph.nodes if n.op == "call_function"}
    assert (captured(z).double() - torch.tanh(z.double())).abs().max() <= 3e-7


def test_tanh_is_left_alone_in_float64_and_where_gradients_follow() -> None:
    for example, final in ((torch.zeros(3), True), (torch.zeros(3, dtype=torch.float32), False)):
        captured = capture(torch.tanh, example, final=final)
        assert any("tanh" in str(n.target) for n in captured.module.graph.nodes)


def test_random_operations_are_found() -> None:
    assert random_nodes(capture(lambda x: x + torch.randn(3), torch.zeros(3)).module)
    assert random_nodes(capture(lambda x: nn.functional.dropout(x, 0.5, training=True), torch.zeros(3)).module)
    assert not random_nodes(capture(lambda x: x.sin(), torch.zeros(3)).module)


def test_writing_into_a_constant_is_found() -> None:
    norm = nn.BatchNorm1d(3)
    assert mutating_nodes(capture(norm, torch.zeros(4, 3)).module)
    assert not mutating_nodes(capture(norm.eval(), torch.zeros(4, 3)).module)


def test_worth_compiling_depends_on_the_work_ahead_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(energy, torch.zeros(3), torch.zeros(5, 3))
    monkeypatch.setattr(graph, "compiler_available", lambda: True)
    assert not worth_compiling(captured, 100)
    assert worth_compiling(captured, 1e9)
    monkeypatch.setattr(graph, "compiler_available", lambda: False)
    assert not worth_compiling(captured, 1e9)


def test_without_a_compiler_the_plain_graph_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graph, "compiler_available", lambda: False)
    captured = capture(energy, torch.zeros(3), torch.zeros(5, 3), compile=True)
    assert not captured.compiled
    assert "no C++ compiler found" in caplog.text
    w, x = draw(3), draw(5, 3, seed=1)
    torch.testing.assert_close(captured(w, x), energy(w, x), **EXACT)


def test_a_failing_compiler_falls_back_to_the_plain_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no space left")

    monkeypatch.setattr(graph, "compiler_available", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", fails)
    captured = hot(energy, torch.zeros(3), torch.zeros(5, 3), compile=True)
    assert not captured.compiled
    assert "compilation failed (RuntimeError)" in caplog.text


@pytest.mark.compiler
def test_compiled_graph_is_the_function_with_and_without_grad_mode() -> None:
    fn = vmap(grad(energy), in_dims=(0, None))
    captured = hot(fn, torch.zeros(4, 3), torch.zeros(5, 3), compile=True)
    assert captured.compiled
    w, x = draw(4, 3), draw(5, 3, seed=1)
    torch.testing.assert_close(captured(w, x), fn(w, x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(captured(w, x), fn(w, x), rtol=1e-9, atol=1e-9)
    assert not captured(w, x).requires_grad


@pytest.mark.compiler
def test_a_long_run_is_compiled_with_its_calling_code(monkeypatch: pytest.MonkeyPatch) -> None:
    options = []
    original = torch._inductor.compile

    def compile_(module: Any, flat: Any, chosen: dict[str, Any]) -> Any:
        options.append(chosen["cpp_wrapper"])
        return original(module, flat, chosen)

    monkeypatch.setattr(torch._inductor, "compile", compile_)
    fn = vmap(grad(energy), in_dims=(0, None))
    w, x = draw(4, 3), draw(5, 3, seed=1)
    for num_calls in (1e3, 1e7):
        captured = hot(fn, w, x, compile=True, num_calls=num_calls)
        assert captured.compiled
        torch.testing.assert_close(captured(w, x), fn(w, x), rtol=1e-9, atol=1e-9)
    assert options == [False, True]
