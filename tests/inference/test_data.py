"""Inputs and targets: what is accepted, and what the refusals say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from inference.data import check_data, check_inputs, chunks, index, num_data, shapes

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)


def test_lists_become_tuples_and_sizes_are_read_off_any_leaf() -> None:
    x, _, batch_size = check_data([X, X[:, 0]], Y)
    assert isinstance(x, tuple)
    assert (num_data(x), batch_size) == (6, None)
    assert torch.equal(index(x, torch.tensor([1, 0]))[1], torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X.numpy(), Y, TypeError, "x must be a torch.Tensor.*ndarray.*torch.as_tensor"),
        ({}, Y, TypeError, "got nothing"),
        (X, None, TypeError, "fit needs targets"),
        (X, Y.numpy(), TypeError, "y must be a torch.Tensor, got ndarray"),
        (X, Y[:4], ValueError, r"x has 6 rows but y has shape \(4,\)"),
        (X, torch.tensor(1.0), ValueError, r"y has shape \(\)"),
        (X[:0], Y[:0], ValueError, "x is empty"),
        ({"a": X, "b": X[:3]}, Y, ValueError, "same first dimension.*6.*3"),
        (torch.tensor(1.0), Y, ValueError, "same first dimension"),
        (torch.where(X == 4, torch.nan, X), Y, ValueError, "x holds NaN.*1 of 6 rows .first: row 2."),
        (
            X,
            torch.where(Y > 3, torch.inf, Y),
            ValueError,
            "y holds NaN or infinite values in 2 of 6 rows .first: row 4.",
        ),
    ],
)
def test_unusable_data_are_refused_with_the_reason(x: object, y: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_data(x, y)


def test_new_inputs_must_look_like_the_training_inputs() -> None:
    like = {"a": X, "b": Y}
    assert list(check_inputs({"b": Y[:2], "a": X[:2]}, like=like)) == ["a", "b"]
    with pytest.raises(ValueError, match=r"rows of shape \(3,\), but the posterior was fitted to rows of shape \(2,\)"):
        check_inputs(torch.zeros(4, 3), like=X)
    with pytest.raises(TypeError, match="x is torch.float32, but the posterior was fitted to torch.float64"):
        check_inputs(X.float(), like=X.double())
    with pytest.raises(TypeError, match="x has the structure"):
        check_inputs({"a": X}, like=like)


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders_are_gathered_whole_in_order_and_without_touching_the_random_state(shuffle: bool) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=shuffle, drop_last=True)
    state = torch.random.get_rng_state()
    x, y, batch_size = check_data(loader)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert batch_size == 4


def test_loaders_of_dicts_are_gathered_leaf_by_leaf() -> None:
    loader = DataLoader([({"a": X[i]}, Y[i]) for i in range(6)], batch_size=4)  # type: ignore[arg-type]
    x, y, _ = check_data(loader)
    assert torch.equal(x["a"], X)
    assert torch.equal(y, Y)


def test_loaders_with_targets_beside_them_or_without_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="takes the targets from the loader"):
        check_data(DataLoader(TensorDataset(X, Y)), Y)
    with pytest.raises(ValueError, match="must yield .x, y. pairs"):
        check_data(DataLoader(TensorDataset(X), batch_size=2))


def test_chunks_cover_the_range_once() -> None:
    assert [list(range(7))[c] for c in chunks(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_shapes_tell_structure_shape_and_dtype_apart() -> None:
    keys = {shapes(X), shapes(X[:3]), shapes(X.float()), shapes({"a": X}), shapes((X, X))}
    assert len(keys) == 4 + (X.dtype != torch.float32)
    assert shapes(X) == shapes(X + 1)
