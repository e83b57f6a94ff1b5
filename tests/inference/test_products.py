import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.graph import capture
from inference.products import arrange_products

aten = torch.ops.aten
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Log density of a 3-5-4-1 network, products written in both orders."""
    first, bias, second, last = theta.split([15, 5, 20, 4])
    h = torch.tanh(x @ first.view(5, 3).T + bias)
    h = torch.tanh(second.view(4, 5) @ h.T)
    f = last.view(1, 4) @ h
    return -0.5 * (y - f.squeeze(0)).square().sum() - 0.5 * theta.square().sum()


def targets(module: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("num", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 2, 40, 300])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_a_batched_network_are_unchanged(num: int, rows: int, fused: bool) -> None:
    fn = vmap(grad_and_value(network), in_dims=(0, None, None))
    args = draw(num, 44), draw(rows, 3, seed=1), draw(rows, seed=2)
    captured = capture(fn, *args)
    arrange_products(captured.module, list(args), fused=fused)
    found = captured.module.forward(*args)
    for a, b in zip(found, fn(*args), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert a.stride() == b.stride()


def test_batched_products_with_the_data_become_one() -> None:
    fn = vmap(grad_and_value(lambda w, x: torch.tanh(x @ w.view(5, 3).T).square().sum()), in_dims=(0, None))
    module = capture(fn, draw(4, 15), draw(100, 3, seed=1)).module
    assert aten.bmm.default not in targets(module)
    assert targets(module).count(aten.mm.default) == 2


def test_no_product_has_a_short_last_side_after_a_long_one() -> None:
    module = capture(grad_and_value(network), draw(44), draw(300, 3, seed=1), draw(300, seed=2)).module
    products = [n.meta["val"] for n in module.graph.nodes if n.target in (aten.mm.default, aten.bmm.default)]
    assert products
    assert all(value.shape[-2] <= value.shape[-1] for value in products)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 6, 3), (2, 3, 4)),
        ((2, 4, 3), (2, 3, 6)),
        ((2, 6, 3), (2, 3, 1)),
        ((2, 1, 3), (2, 3, 6)),
        ((2, 6, 1), (2, 1, 4)),
        ((1, 6, 3), (1, 3, 4)),
    ],
)
def test_batched_products_are_unchanged(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = draw(*left), draw(*right, seed=1)
    found = capture(torch.bmm, a, b)(a, b)
    torch.testing.assert_close(found, torch.bmm(a, b), **EXACT)
    assert found.is_contiguous()


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("columns", [3, 9])
@pytest.mark.parametrize("first", [True, False])
def test_products_with_a_shared_matrix_are_unchanged(rows: int, columns: int, first: bool) -> None:
    def product(batch: Tensor, matrix: Tensor) -> Tensor:
        shared = matrix.expand(3, *matrix.shape)
        return (torch.bmm(shared, batch) if first else torch.bmm(batch, shared)).exp()

    batch, matrix = (draw(3, 5, columns), draw(rows, 5)) if first else (draw(3, rows, 5), draw(5, columns))
    captured = capture(product, batch, matrix)
    assert aten.bmm.default not in targets(captured.module)
    torch.testing.assert_close(captured(batch, matrix), product(batch, matrix), **EXACT)


def test_products_with_vectors_are_elementwise_only_for_a_compiler() -> None:
    a, b = draw(6, 3), draw(3, 1, seed=1)
    captured = capture(torch.mm, a, b)
    assert aten.mm.default in targets(captured.module)
    arrange_products(captured.module, [a, b], fused=True)
    assert aten.mm.default not in targets(captured.module)
    torch.testing.assert_close(captured.module.forward(a, b)[0], a @ b, **EXACT)


def test_affine_products_are_unchanged() -> None:
    bias, a, b = draw(4), draw(9, 3), draw(3, 4, seed=1)
    for fn in (torch.addmm, lambda c, x, w: torch.addmm(c, x, w).relu().sum(1)):
        torch.testing.assert_close(capture(fn, bias, a, b)(bias, a, b), fn(bias, a, b), **EXACT)


def test_an_affine_product_with_factors_keeps_them() -> None:
    bias, a, b = draw(4), draw(9, 3), draw(3, 4, seed=1)

    def scaled(c: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.addmm(c, x, w, beta=2.0, alpha=-0.5)

    torch.testing.assert_close(capture(scaled, bias, a, b)(bias, a, b), scaled(bias, a, b), **EXACT)


def test_indexing_by_a_constant_mask_is_no_obstacle() -> None:
    keep = torch.tensor([True, False, True, True])

    def chosen(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w)[:, keep]

    x, w = draw(9, 3), draw(3, 4, seed=1)
    torch.testing.assert_close(capture(chosen, x, w)(x, w), chosen(x, w), **EXACT)
