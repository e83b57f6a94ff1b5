import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from inference.graph import capture

aten = torch.ops.aten


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def operations(module: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_doubling_the_terms_of_a_sum_changes_no_bit(dtype: torch.dtype) -> None:
    small, large = draw(5, 1, dtype=dtype), draw(5, 100, dtype=dtype)
    for fn in (lambda a, b: (a + b) * 2.0, lambda a, b: 2 * (b + a)):
        program = capture(fn, small, large)
        assert torch.equal(program(small, large), 2 * (small + large))
        assert program(small, large).stride() == large.stride()
        (total,) = (n for n in program.module.graph.nodes if n.target is aten.add.Tensor)
        assert total.kwargs == {"alpha": 2.0}


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: (b + b.exp()) * 2.0,  # no term is small
        lambda a, b: (a + b) * 3.0,  # would round
        lambda a, b: (s := a + b) * 2.0 + s,  # the sum is needed too
        lambda a, b: torch.add(a, b, alpha=3) * 2.0,
    ],
)
def test_other_sums_stay_as_they_are(fn: object) -> None:
    small, large = draw(5, 1), draw(5, 100)
    program = capture(fn, small, large)  # type: ignore[arg-type]
    assert all(n.kwargs.get("alpha") != 2.0 for n in program.module.graph.nodes)
    torch.testing.assert_close(program(small, large), fn(small, large))  # type: ignore[operator]


def test_integers_are_doubled_where_they_were() -> None:
    small, large = torch.arange(5)[:, None], torch.arange(500).view(5, 100)
    assert torch.equal(capture(lambda a, b: (a + b) * 2, small, large)(small, large), 2 * (small + large))


def test_hidden_units_of_many_networks_take_four_passes_over_memory() -> None:
    def network(theta: Tensor, x: Tensor) -> Tensor:
        weight, bias = theta.split([150, 50])
        return torch.tanh(x @ weight.view(50, 3).T + bias)

    thetas, x = draw(4, 200), draw(100, 3)
    module = capture(vmap(network, in_dims=(0, None)), thetas, x).module
    whole = [n.target for n in module.graph.nodes if getattr(n.meta.get("val"), "shape", ()) == (4, 50, 100)]
    passes = [t for t in whole if torch.Tag.pointwise in getattr(t, "tags", ())]
    assert passes == [aten.add.Tensor, aten.sigmoid.default, aten.rsub.Scalar]
    expected = torch.stack([network(t, x) for t in thetas])
    torch.testing.assert_close(capture(vmap(network, in_dims=(0, None)), thetas, x)(thetas, x), expected)


def test_gradients_through_the_rewritten_graph_are_those_of_tanh() -> None:
    x, bias = draw(5, 100), draw(5, 1)
    program = capture(lambda b, x: torch.tanh(b + x).sum(), bias, x)
    torch.testing.assert_close(grad(program)(bias, x), grad(lambda b: torch.tanh(b + x).sum())(bias))
