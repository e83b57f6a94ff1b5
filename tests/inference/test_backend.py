"""What all backends share: hyperparameter checks, minibatches, progress, the record of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.backend import Backend, Bar, Batches, ConvergenceWarning, Run, check_integer, check_positive, stacked
from inference.target import Target, compile_target
from tests.cases import CASES, X, Y, by_hand, normal


@dataclass(frozen=True, kw_only=True)
class Still(Backend):
    """Stays where it starts."""

    num_steps: int = 3
    bias: ClassVar[str] = "does not move"
    capabilities: ClassVar[frozenset[str]] = frozenset({"temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_steps", minimum=1)

    def fit_target(self, target: Target, run: Run) -> Any:
        run.count(2.5)
        if self.num_steps == 2:
            run.warn(ConvergenceWarning, "stopped at 2 steps")

        class Record:
            info: Any = None
            theta = target.initial(1, run.seed, run.init)[0]
            temperature = target.temperature

        return Record()


@dataclass(frozen=True, kw_only=True)
class Untempered(Still):
    """Has no temperature."""

    capabilities: ClassVar[frozenset[str]] = frozenset()


def target_of(num: int) -> Target:
    x = torch.arange(float(num)).unsqueeze(-1).expand(num, 3)
    return compile_target(by_hand, x / num, torch.arange(float(num)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be > 0, got 0.0"),
        ({"temperature": float("nan")}, "`temperature` must be > 0, got nan"),
        ({"likelihood_temperature": True}, "`likelihood_temperature` must be > 0, got True"),
        ({"compile": "yes"}, "`compile` must be True, False or \"auto\", got 'yes'"),
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1, got 0"),
        ({"num_steps": 2.0}, "`num_steps` must be an integer >= 1, got 2.0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Still(**fields)


def test_backends_without_a_temperature_refuse_one() -> None:
    with pytest.raises(ValueError, match="Untempered has no temperature: does not move"):
        Untempered(temperature=2.0)
    assert Still(temperature=2.0).fit(by_hand, X, Y).temperature == 2.0  # type: ignore[attr-defined]


def test_repr_recreates_a_backend() -> None:
    backend = Still(num_steps=5, temperature=0.5)
    assert eval(repr(backend)) == backend
    assert "num_steps" in Still.field_names()


@pytest.mark.parametrize("seed", [-1, 1.0, True, None])
def test_seeds_must_be_nonnegative_integers(seed: Any) -> None:
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0"):
        Still().fit(by_hand, X, Y, seed=seed)


def test_a_fit_records_cost_and_warnings() -> None:
    with pytest.warns(ConvergenceWarning, match="stopped at 2 steps"):
        posterior = Still(num_steps=2).fit(by_hand, X, Y, seed=1)
    assert posterior.info.gradients == 2.5
    assert posterior.info.seconds > 0
    assert posterior.info.warnings == [("ConvergenceWarning", "stopped at 2 steps")]


def test_none_passes_the_checks() -> None:
    class Owner:
        size = None

    check_positive(Owner(), "size")
    check_integer(Owner(), "size")


@pytest.mark.parametrize(("num", "size"), [(12, 4), (12, 5), (7, 3)])
def test_every_epoch_is_a_permutation_and_every_batch_full(num: int, size: int) -> None:
    target = target_of(num)
    batches = Batches(target, size, target.streams(0, 2))
    steps = num  # num * size rows: exactly `size` epochs
    drawn = [batches.next() for _ in range(steps)]
    assert all(x.shape == (2, size, 3) and y.shape == (2, size) for x, y in drawn)
    rows = torch.cat([y for _, y in drawn], dim=1)  # targets are row numbers
    assert torch.equal(torch.cat([x[..., 0] for x, _ in drawn], dim=1) * num, rows)
    for member in rows:
        for epoch in member.reshape(size, num):
            assert torch.equal(epoch.sort().values, torch.arange(float(num)))
    assert not torch.equal(rows[0], rows[1])


def test_a_members_batches_do_not_depend_on_how_many_train_beside_it() -> None:
    target = target_of(12)
    alone, beside = Batches(target, 5, [target.stream(3, 1)]), Batches(target, 5, target.streams(3, 4))
    for _ in range(6):
        assert torch.equal(alone.next()[1][0], beside.next()[1][1])


def test_full_batches_share_the_data() -> None:
    target = target_of(12)
    for size in (None, 12, 100):
        batches = Batches(target, size, target.streams(0, 2))
        assert batches.full
        assert batches.in_dims == (None, None)
        assert batches.cost == 1.0
        assert batches.next()[1] is target.y
    small = Batches(target, 3, target.streams(0, 2))
    assert (small.in_dims, small.cost) == ((0, 0), 0.25)
    x, y = small.example()
    assert (x.shape, y.shape) == ((2, 3, 3), (2, 3))
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0"):
        Batches(target, 0, target.streams(0, 1))


def test_batches_of_dicts_keep_their_structure() -> None:
    case = next(c for c in CASES if c.name == "dict_inputs")
    target = compile_target(case.model(), case.x, case.y)
    x, _ = Batches(target, 5, target.streams(0, 2)).next()
    assert {k: tuple(v.shape) for k, v in x.items()} == {"numbers": (2, 5, 3), "group": (2, 5)}


def test_bars_are_silent_without_a_terminal_and_when_told(capfd: pytest.CaptureFixture[str]) -> None:
    for show in (None, False):
        with Bar(10, "MAP", show) as bar:
            bar.advance(5, loss=1.0)
            assert not bar.shown
    assert capfd.readouterr() == ("", "")


def test_bars_are_shown_when_asked() -> None:
    with Bar(10, "MAP", True) as bar:
        bar.advance(10, loss=1.25)
        assert bar.shown


def _network(width: int) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w1 = pyro.sample("w1", normal(x.shape[1], width))
        w2 = pyro.sample("w2", normal(width, 1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((torch.tanh(x @ w1) @ w2).squeeze(-1), 1.0), obs=y)

    return model


def test_stacking_is_decided_by_the_largest_matrix_product() -> None:
    small = compile_target(_network(50), torch.zeros(691, 8), torch.zeros(691))
    large = compile_target(_network(400), torch.zeros(100, 784), torch.zeros(100))
    assert stacked(small, 10, 691)
    assert not stacked(large, 2, 100)
    assert stacked(large, 1, 100)
    assert stacked(large, 10, 10)


def test_products_of_middle_size_are_stacked_while_caches_hold_them() -> None:
    images = compile_target(_network(200), torch.zeros(100, 784), torch.zeros(100))
    assert stacked(images, 10, 100)
    assert not stacked(images, 40, 100)  # the thetas fill the shared cache
    long = compile_target(_network(50), torch.zeros(20_000, 8), torch.zeros(20_000))
    assert not stacked(long, 2, 20_000)  # the activations fill the core's
