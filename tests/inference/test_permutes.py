from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference.graph import capture
from inference.permutes import sink_permutes

aten = torch.ops.aten


def sunk(fn: Callable[..., Tensor], *args: Tensor) -> torch.fx.GraphModule:
    module = capture(fn, *args, final=False).module
    sink_permutes(module, [n for n in module.graph.nodes if n.target is aten.permute.default])
    module.graph.lint()
    module.recompile()
    return module


def order(module: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


CASES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, b: (x.permute(1, 0, 2) + b).tanh(),
    lambda x, b: b * x.permute(2, 0, 1) - 3.0,
    lambda x, b: torch.where(x.permute(1, 0, 2) > 0, b, 0.0),
    lambda x, b: x.permute(1, 0, 2).exp().sum([0, -1]),
    lambda x, b: x.permute(2, 0, 1).sum([1], keepdim=True) * 2.0,
    lambda x, b: x.permute(2, 0, 1).sin().sum(0),
    lambda x, b: x.permute(1, 0, 2).transpose(1, 2).cos().permute(2, 0, 1),
    lambda x, b: x.permute(1, 0, 2).sin() + x.permute(1, 0, 2).cos(),
    lambda x, b: x[:3, :3, :3].permute(1, 0, 2) + x[:3, :3, :3].permute(0, 2, 1),
    lambda x, b: x.permute(1, 0, 2).neg().reshape(-1).softmax(0),
    lambda x, b: x.permute(1, 0, 2).sum(),
]


@pytest.mark.parametrize("fn", CASES)
def test_moving_permutes_changes_no_value(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, b = torch.randn(4, 5, 3, generator=generator), torch.randn(3, generator=generator)
    if fn is CASES[1]:
        b = torch.randn(5, generator=generator)
    torch.testing.assert_close(sunk(fn, x, b).forward(x, b)[0], fn(x, b), rtol=1e-12, atol=1e-12)


def test_arithmetic_comes_before_the_permutation() -> None:
    module = sunk(lambda x: (2.0 * x.permute(1, 0, 2)).tanh(), torch.zeros(4, 5, 3))
    assert order(module) == [aten.mul.Tensor, aten.tanh.default, aten.permute.default]


def test_permutations_that_undo_each_other_disappear() -> None:
    module = sunk(lambda x: x.permute(1, 2, 0).tanh().permute(2, 0, 1), torch.zeros(4, 5, 3))
    assert order(module) == [aten.tanh.default]


def test_sums_leave_their_dimensions_in_the_right_order() -> None:
    module = sunk(lambda x: x.permute(2, 0, 1).sum(2), torch.zeros(4, 5, 3))
    x = torch.arange(60.0).view(4, 5, 3)
    torch.testing.assert_close(module.forward(x)[0], x.permute(2, 0, 1).sum(2))
    assert order(module)[0] is aten.sum.dim_IntList
