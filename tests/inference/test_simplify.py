"""Every simplified graph against the graph as it was recorded, on random inputs."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx
from torch.func import grad, hessian, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from inference.simplify import simplify

aten = torch.ops.aten
ONES = torch.ones(3, dtype=torch.float64)
TWO_BY_THREE = torch.full((2, 3), 2.0, dtype=torch.float64)


def recorded(fn: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    def flat(*leaves: Tensor) -> list[Tensor]:
        out = fn(*leaves)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    return make_fx(flat)(*args)


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """A second module with constants of its own, which the first may then write into."""
    copied = fx.GraphModule(module, fx.Graph())
    mapping: dict[fx.Node, fx.Node] = {}
    out = copied.graph.graph_copy(module.graph, mapping)
    copied.graph.output(out)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    clones: dict[int, Tensor] = {}
    for name, buffer in module.named_buffers(remove_duplicate=False):
        copied.register_buffer(name, clones.setdefault(id(buffer), buffer.clone()))
    copied.recompile()
    return copied


def both(fn: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph as recorded and its simplified twin."""
    plain = recorded(fn, *args)
    small = copy_of(plain)
    simplify(small)
    return plain, small


def agree(fn: Callable[..., Any], *args: Tensor, calls: int = 2, tolerance: float | None = None) -> fx.GraphModule:
    """Check values, shapes, dtypes and what may be viewed; returns the simplified graph."""
    plain, small = both(fn, *args)
    for call in range(calls):
        scaled = [a * (1 + 0.5 * call) if a.is_floating_point() else a for a in args]
        expected, got = plain(*[a.clone() for a in scaled]), small(*[a.clone() for a in scaled])
        assert len(expected) == len(got)
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            limit = tolerance or (1e-12 if a.dtype == torch.float64 else 2e-5)
            torch.testing.assert_close(b, a, rtol=limit, atol=limit, equal_nan=True)
    assert len(small.graph.nodes) <= len(plain.graph.nodes) + len(got)
    return small


def operations(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


# -- densities and their derivatives -----------------------------------------------------------------------------------


def cholesky_density(z: Tensor) -> Tensor:
    transform = dist.transforms.CorrCholeskyTransform()
    return dist.LKJCholesky(3, 1.5, validate_args=False).log_prob(transform(z)) + transform.log_abs_det_jacobian(
        z, transform(z)
    )


def simplex_density(z: Tensor) -> Tensor:
    transform = dist.transforms.StickBreakingTransform()
    value = transform(z)
    return dist.Dirichlet(torch.tensor([0.5, 2.0, 3.0, 1.0], dtype=z.dtype), validate_args=False).log_prob(value) + (
        transform.log_abs_det_jacobian(z, value)
    )


def mixture_density(z: Tensor) -> Tensor:
    weights = dist.Categorical(torch.tensor([0.3, 0.7], dtype=z.dtype), validate_args=False)
    parts = dist.Normal(torch.tensor([-1.0, 1.0], dtype=z.dtype), torch.tensor([0.1, 2.0], dtype=z.dtype))
    return dist.MixtureSameFamily(weights, parts, validate_args=False).log_prob(z).sum()


def learnt_noise_density(z: Tensor) -> Tensor:
    scale = z[0].exp()
    return dist.HalfNormal(1.0).log_prob(scale) + z[0] + dist.Normal(z[1], scale).log_prob(z[2:] * 0.5 + 1).sum()


def quiet(make: Callable[[Tensor], Any], value: Callable[[Tensor], Tensor] = lambda z: z) -> Callable[[Tensor], Tensor]:
    return lambda z: make(z).log_prob(value(z)).sum()


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": quiet(lambda z: dist.Normal(0.0, 1.0)),
    "normal scaled": quiet(lambda z: dist.Normal(torch.zeros(3, dtype=z.dtype), 0.1).to_event(1)),
    "normal expanded": quiet(lambda z: dist.Normal(torch.zeros((), dtype=z.dtype), 2.0).expand([3]).to_event(1)),
    "student t": quiet(lambda z: dist.StudentT(torch.tensor(4.0, dtype=z.dtype), 0.5, 2.0)),
    "gamma": quiet(lambda z: dist.Gamma(torch.tensor(3.0, dtype=z.dtype), 2.0), torch.exp),
    "beta": quiet(lambda z: dist.Beta(torch.tensor(2.0, dtype=z.dtype), 0.5), torch.sigmoid),
    "laplace": quiet(lambda z: dist.Laplace(torch.zeros(3, dtype=z.dtype), 0.7)),
    "horseshoe": quiet(lambda z: dist.Normal(0.0, z[:1].exp()), lambda z: z[1:]),
    "cauchy": quiet(lambda z: dist.HalfCauchy(torch.tensor(1.0, dtype=z.dtype)), torch.exp),
    "lkj": cholesky_density,
    "dirichlet": simplex_density,
    "mixture": mixture_density,
    "learnt noise": learnt_noise_density,
    "categorical": quiet(lambda z: dist.Categorical(logits=torch.outer(z, z)), lambda z: torch.tensor([0, 2, 1])),
    "poisson": quiet(lambda z: dist.Poisson(z.exp()), lambda z: torch.tensor([0.0, 2.0, 5.0], dtype=z.dtype)),
    "bernoulli": quiet(lambda z: dist.Bernoulli(logits=z), lambda z: torch.tensor([0.0, 1.0, 1.0], dtype=z.dtype)),
    "multivariate": quiet(lambda z: dist.MultivariateNormal(z * 0, scale_tril=torch.eye(3, dtype=z.dtype) * 0.3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", DENSITIES)
def test_densities_and_their_derivatives_are_unchanged(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    loose = None if dtype == torch.float64 else 3e-4
    pyro.enable_validation(False)
    density, z = DENSITIES[name], rand(3, dtype=dtype)
    agree(density, z, tolerance=loose)
    agree(vmap(grad(density)), rand(4, 3, dtype=dtype), tolerance=loose)
    agree(jacrev(grad(density)), z, tolerance=loose)


def test_a_network_with_learnt_noise_is_unchanged_and_smaller() -> None:
    x, y = rand(20, 3), rand(20)

    def density(theta: Tensor) -> Tensor:
        w, b, v, s = theta.split([12, 4, 4, 1])
        f = torch.tanh(x @ w.view(3, 4) + b) @ v
        prior = sum(dist.Normal(0.0, 1.0, validate_args=False).log_prob(p).sum() for p in (w, b, v, s))
        return prior + dist.Normal(f, s.exp(), validate_args=False).log_prob(y).sum()

    plain = recorded(grad(density), rand(21))
    small = agree(grad(density), rand(21))
    assert len(small.graph.nodes) < 0.75 * len(plain.graph.nodes)
    agree(hessian(density), rand(21), tolerance=1e-10)
    agree(vmap(grad(density)), rand(5, 21))


def test_the_log_of_an_exponential_is_not_computed() -> None:
    small = agree(lambda u: u.exp().log() + 1.0, rand(3))
    assert operations(small) == ["aten.add.Tensor"]


# -- single rules ------------------------------------------------------------------------------------------------------

CLASSES = torch.tensor([[0], [2], [1], [2]])


def scattered(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Halves at an index of zeros, as in the gradient of the log probability of a class."""
    return torch.zeros_like(x).scatter_add(dim, index, torch.full(index.shape, 0.5, dtype=x.dtype))


RULES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "constant broadcasts the other up": (lambda x: x * torch.ones(2, 3), (rand(3),)),
    "constant broadcasts a scalar up": (lambda x: torch.ones(4) * x + torch.zeros(2, 1), (rand(1)[0],)),
    "constant raises the dtype": (lambda x: x * ONES, (rand(3, dtype=torch.float32),)),
    "scalar constant keeps the dtype": (lambda x: x * ONES[0], (rand(3, dtype=torch.float32),)),
    "int times one": (lambda n: n * 1 + 0, (torch.arange(3),)),
    "int times a float one": (lambda n: n * 1.0, (torch.arange(3),)),
    "int divided by one": (lambda n: n / 1, (torch.arange(3),)),
    "integer division": (lambda n: n // 2 + torch.div(n, 2, rounding_mode="trunc"), (torch.arange(-3, 4),)),
    "bool": (lambda n: (n > 1) & torch.ones(3, dtype=torch.bool), (torch.arange(3),)),
    "sum of bool": (lambda n: (n > 1).sum(), (torch.arange(3),)),
    "sum of bool over one": (lambda n: (n > 1).reshape(3, 1).sum(1), (torch.arange(3),)),
    "sum of bool over one, then all": (lambda n: (n > 1).reshape(3, 1).sum(0).sum(), (torch.arange(3),)),
    "sum with a dtype": (lambda x: x.sum(0, dtype=torch.float64).sum(), (rand(2, 3, dtype=torch.float32),)),
    "sum over one with a dtype": (lambda x: x.sum(1, dtype=torch.float64), (rand(3, 1, dtype=torch.float32),)),
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=0) + torch.add(y, x, alpha=2), (rand(3), rand(3) + 1)),
    "add zeros with alpha": (lambda x: torch.add(torch.zeros(3), x, alpha=3), (rand(3),)),
    "sub ones with alpha": (lambda x: torch.sub(x, torch.ones(3), alpha=3) * 2, (rand(3),)),
    "subtract from a constant": (lambda x: 1 - (2 - x) - torch.zeros(3), (rand(3),)),
    "divide by zero": (lambda x: x / 0.0 * 2.0 + (x * 2) / 0, (rand(3),)),
    "divide by zeros": (lambda x: x / torch.zeros(3) * 2.0, (rand(3),)),
    "zero divided": (lambda x: torch.zeros(3) / x, (rand(3),)),
    "infinite factor": (lambda x: (x + 1.0) * float("inf") * 2.0, (rand(3) - 1.2,)),
    "infinite constant": (lambda x: x + torch.full((3,), float("inf")) - 1.0, (rand(3),)),
    "nan constant": (lambda x: x * torch.full((3,), float("nan")) * 1.0, (rand(3),)),
    "nan factor": (lambda x: (x * float("nan") + 1.0) * 0.0, (rand(3),)),
    "factors beyond single precision": (lambda x: (x * 1e30) * 1e-30 * 1e-30, (rand(3, dtype=torch.float32),)),
    "power one": (lambda x: x**1 + x**2, (rand(3),)),
    "sum keepdim": (lambda x: ((x * 2 + 3).sum(-1, keepdim=True) + 1).sum(0), (rand(4, 3),)),
    "sum of negative dims": (lambda x: (x / 4 - 3).sum((-1, -3)), (rand(2, 4, 3),)),
    "sum of no dims": (lambda x: (x * 3 + 1).sum([]), (rand(2, 3),)),
    "expand then sum": (lambda x: (x * 2 + 1).expand(5, 3).sum(), (rand(3),)),
    "expand then sum of one": (lambda x: x.expand(4, 3).sum(1) + x.expand(4, 3).sum(0).sum(), (rand(1),)),
    "affine then expand then sum": (lambda x: ((x * 2 + 1).expand(5, 3) * 3 + 1).sum(0), (rand(3),)),
    "expanded operand": (lambda x, y: x.expand(4, 3) * y + y / x.expand(4, 3), (rand(3), rand(4, 3))),
    "expanded operand of another dtype": (lambda x, y: x.expand(3) * y, (rand(1)[0], rand(3, dtype=torch.float32))),
    "two expanded operands": (lambda x, y: x.expand(4, 3) * y.expand(4, 3), (rand(3), rand(4, 1))),
    "size zero": (lambda x: (x * 2 + 1).sum() + (x + 3).sum(0).sum(), (rand(0, 3),)),
    "size zero sum": (lambda x: (x * 2 + 1).sum(0), (rand(0, 3),)),
    "size one": (lambda x: (x.view(1, 1, 1) * 2 + 1).sum(0).squeeze(), (rand(1),)),
    "constant result": (lambda x: (x * 0 + 1, torch.ones(3) * 2), (rand(3),)),
    "input as result": (lambda x: (x, x * 1.0, x + 0, x.clone()), (rand(3),)),
    "same result twice": (lambda x: (x.exp(), x.exp(), x.exp()), (rand(3),)),
    "transposed twice": (
        lambda x: (x.t().t() @ x.t().transpose(0, 1), x.transpose(0, 1).transpose(1, 0)),
        (rand(3, 3),),
    ),
    "transposed once": (lambda x: x.transpose(0, 1).transpose(1, 2), (rand(3, 3, 3),)),
    "one part": (lambda x: torch.cat([x.split(3)[0]]) * 2, (rand(3),)),
    "first of two parts": (lambda x: torch.cat([x.split(2)[0]]) * 2, (rand(3),)),
    "where everywhere": (lambda x: torch.where(ONES > 0, x, x * 2) + torch.where(ONES < 0, x, x * 2), (rand(3),)),
    "where somewhere": (lambda x: torch.where(torch.arange(3) > 0, x, x * 2), (rand(3),)),
    "where broadcasts": (lambda x: torch.where(torch.ones(2, 3) > 0, x, x * 2), (rand(3),)),
    "arange": (lambda x: x * torch.arange(3) + torch.arange(3) * 2, (rand(3),)),
    "uniform constant": (
        lambda x: (x * torch.full((3,), 2.0) + torch.full((3,), 1.0)) / torch.full((3,), 4.0),
        (rand(3),),
    ),
    "indexing": (lambda x: x[torch.tensor([2, 0])] * 1.0, (rand(3),)),
    "totals": (
        lambda x, y: ((x * 2 + 1).sum() * -0.5 - 3) + ((y + 2).sum() * -0.5 + 1) + y.sum() * 3,
        (rand(3), rand(4)),
    ),
    "slice of an expansion": (lambda x: x.expand(4, 3)[:, :1] + x.expand(4, 3)[1:3, :1].sum(), (rand(4, 1),)),
    "all of an expansion but a part": (lambda x: x.expand(2, 4, 3)[:, 1:] * x.expand(2, 4, 3)[:1, :3], (rand(4, 3),)),
    "one number in every row": (lambda x, i: scattered(x, i, 1).sum(1, keepdim=True) * x, (rand(4, 3), CLASSES)),
    "one number in every row, by columns": (lambda x, i: scattered(x, i, 1).sum(0), (rand(4, 3), CLASSES)),
    "one number in every row, all summed": (lambda x, i: scattered(x, i, 1).sum((0, 1)) * x, (rand(4, 3), CLASSES)),
    "two numbers in every row": (lambda x, i: scattered(x, i.expand(4, 2), 1).sum(1), (rand(4, 3), CLASSES)),
    "one number in some rows": (lambda x, i: scattered(x, i[:2], 1).sum(1), (rand(4, 3), CLASSES)),
    "numbers along the other dimension": (lambda x, i: scattered(x, i, 0).sum(0), (rand(4, 3), CLASSES)),
    "total twice": (lambda x: x.sum() * 2 + x.sum() * 2, (rand(3),)),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_keeps_the_values(name: str) -> None:
    fn, args = RULES[name]
    agree(fn, *args)


def test_the_gradient_of_a_class_probability_does_not_sum_what_it_scattered() -> None:
    classes = torch.tensor([0, 2, 1, 2])
    fn = grad(lambda x: dist.Categorical(logits=x, validate_args=False).log_prob(classes).mean())
    small = agree(fn, rand(4, 3))
    assert "aten.sum.dim_IntList" not in operations(small)
    assert "aten.slice.Tensor" not in operations(small)


LAYOUTS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "expanded times one": (lambda x: (x.expand(4, 3) * 1.0).view(12), (rand(3),)),
    "expanded, affine, viewed": (lambda x: (x.expand(4, 3) * 2.0 + 1.0).view(12) * 3.0, (rand(3),)),
    "expanded and cloned": (lambda x: x.expand(4, 3).clone().view(12), (rand(3),)),
    "transposed constant first": (lambda x: (torch.ones(3, 4) * x.t()).view(12), (rand(4, 3),)),
    "transposed and cloned": (lambda x: x.t().contiguous().view(12) + 1, (rand(4, 3),)),
    "transposed plus zeros": (lambda x: (torch.zeros(3, 4) + x.t()).view(2, 6), (rand(4, 3),)),
    "strided": (lambda x: (x[:, ::2] * 2 + 1).view(6), (rand(2, 6),)),
    "strided times one": (lambda x: (x[:, ::2] * 1).view(6), (rand(2, 6),)),
    "sum over one of a transpose": (lambda x: x.t().unsqueeze(0).sum(0).contiguous().view(12), (rand(4, 3),)),
    "channels last": (
        lambda x: (x.contiguous(memory_format=torch.channels_last) * 1.0).permute(0, 2, 3, 1).view(-1),
        (rand(2, 3, 4, 4),),
    ),
    "folded zeros viewed": (lambda x: torch.zeros_like(x).view(12) + x.view(12), (rand(4, 3),)),
    "folded transpose viewed": (lambda x: (TWO_BY_THREE.t() + 0.0 * TWO_BY_THREE.t()).reshape(6) * x, (rand(6),)),
    "as strided": (
        lambda x: torch.zeros(4).as_strided((2, 2), (1, 2)) + torch.ones_like(x).as_strided((2, 2), (2, 1)) * x[0],
        (rand(4),),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_viewed_later_can_still_be_viewed(name: str) -> None:
    fn, args = LAYOUTS[name]
    agree(fn, *args)


# -- writing in place --------------------------------------------------------------------------------------------------


def filled_in(x: Tensor) -> Tensor:
    out = torch.zeros(3)
    out[0] = x[0]
    out[1:] += x[1:] * 2
    return out


def two_buffers(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.zeros(3), torch.zeros(3)
    first[1] = x[0]
    return first * 1.0, second + x


def before_and_after(x: Tensor) -> Tensor:
    state = torch.ones(3)
    before = state + 1
    state.mul_(x)
    after = state + 1
    return before * 10 + after


def cloned_then_written(x: Tensor) -> tuple[Tensor, Tensor]:
    copy = x.clone()
    copy.add_(1.0)
    return copy, x * 2


def written_through_a_view(x: Tensor) -> Tensor:
    table = torch.zeros(2, 3)
    row = table.view(6)[:3]
    early = table.sum()
    row.copy_(x)
    return table.sum(0) + early + table.sum()


def scaled_then_written(x: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.zero_()
    return z + y


@pytest.mark.parametrize(
    "fn", [filled_in, two_buffers, before_and_after, cloned_then_written, written_through_a_view, scaled_then_written]
)
def test_writing_in_place_keeps_its_order(fn: Callable[[Tensor], Any]) -> None:
    agree(fn, rand(3), calls=3)


def test_relu_in_place_is_unchanged() -> None:
    agree(lambda x: torch.relu_(x * 1.0 + 0.5) * 2.0 * 3.0, rand(5), calls=3)


def test_a_buffer_that_the_graph_writes_into_is_kept_up_to_date() -> None:
    buffer = torch.zeros(3)

    def running(x: Tensor) -> Tensor:
        doubled = buffer * 2
        buffer.mul_(0.9).add_(x, alpha=0.1)
        return doubled + buffer * 2

    plain, small = both(running, rand(3))
    for call in range(3):
        torch.testing.assert_close(small(rand(3) + call), plain(rand(3) + call), rtol=1e-12, atol=0)


def test_random_operations_are_neither_folded_nor_merged() -> None:
    _, small = both(
        lambda x: x + torch.rand(3) + torch.rand(3) + torch.nn.functional.dropout(torch.ones(3), 0.5), rand(3)
    )
    assert operations(small).count("aten.rand.default") == 2
    first, second = small(rand(3))[0], small(rand(3))[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["constant result", "input as result", "same result twice"])
def test_results_belong_to_the_caller(name: str) -> None:
    fn, (x,) = RULES[name]
    _, small = both(fn, x)
    expected = [out.clone() for out in small(x)]
    argument = x.clone()
    for i in range(1 if name == "input as result" else 0, len(expected)):
        outs = small(argument)
        outs[i].mul_(0).sub_(5)
        others = [out for j, out in enumerate(outs) if j != i]
        torch.testing.assert_close(others, [e for j, e in enumerate(expected) if j != i])
    torch.testing.assert_close(argument, x)
    torch.testing.assert_close(small(x), expected)


# -- chains of numbers -------------------------------------------------------------------------------------------------

_NUMBERS = st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-3)
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["mul", "add", "sub", "div", "neg", "rsub", "view", "sum", "unsqueeze", "expand"]), _NUMBERS
    ),
    max_size=8,
)


def step(x: Tensor, kind: str, number: float) -> Tensor:
    if kind == "mul":
        return x * number
    if kind == "add":
        return x + number
    if kind == "sub":
        return x - torch.full((1,), number, dtype=x.dtype)
    if kind == "div":
        return x / (number or 1.0)
    if kind == "neg":
        return -x
    if kind == "rsub":
        return number - x
    if kind == "view":
        return x.reshape(-1)
    if kind == "sum":
        return x.sum(0) if x.dim() else x.sum()
    if kind == "unsqueeze":
        return x.unsqueeze(-1)
    return x.expand(2, *x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(steps=_STEPS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_chains_of_numbers_round_no_worse_than_their_largest_intermediate(
    dtype: torch.dtype, steps: list[tuple[str, float]]
) -> None:
    x = rand(2, 3, dtype=dtype)

    def chain(x: Tensor) -> Tensor:
        for kind, number in steps:
            x = step(x, kind, number)
        return x

    largest, size, value = 1.0, 1.0, x
    for kind, number in steps:
        gain = {"mul": abs(number), "div": 1 / abs(number or 1.0), "sum": max(value.shape[:1], default=1)}.get(
            kind, 1.0
        )
        value = step(value, kind, number)
        size = max(size * gain, float(value.abs().max()))
        largest = max(size, abs(number))
    plain, small = both(chain, x)
    unit = torch.finfo(dtype).eps * 32
    torch.testing.assert_close(small(x)[0], plain(x)[0], rtol=unit, atol=unit * largest * (len(steps) + 1))


@pytest.mark.parametrize(
    ("fn", "at"),
    [
        (lambda x: (x - 2000.0) * 0.1, 2000.5),
        (lambda x: (x - 1e8) + 0.5, 1e8),
        (lambda x: (x - 1e6).sum(0), 1e6),
        (lambda x: (x - 1e6).sum() + (x - 1e6).sum(), 1e6),
    ],
)
def test_a_difference_of_near_numbers_keeps_its_digits_in_single_precision(
    fn: Callable[[Tensor], Tensor], at: float
) -> None:
    x = torch.full((3,), at, dtype=torch.float32)
    _, small = both(fn, x)
    torch.testing.assert_close(small(x)[0].double(), fn(x.double()), rtol=1e-6, atol=0)


def test_a_chain_of_numbers_becomes_one_product_and_one_sum() -> None:
    small = agree(lambda x: ((x * 2.0 / 4.0).view(6) * 3.0 + 1.0) + 2.0, rand(2, 3))
    assert sorted(operations(small)) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.view.default"]


def test_repeats_tell_numbers_of_different_types_apart() -> None:
    agree(lambda n: (n * 1, n * 1.0, n * True, n + 1, n + 1.0), torch.arange(3))


def test_constants_nobody_reads_are_dropped() -> None:
    small = agree(lambda x: x * torch.ones(3).exp().log() + torch.zeros(3).sin(), rand(3))
    assert operations(small) == ["aten.mul.Tensor"] or dict(small.named_buffers()) == {}
