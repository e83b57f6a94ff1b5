"""Toy problems: deterministic, different by seed, with the shape their name promises."""

import numpy as np
import pytest
import torch

from bnn_zoo import data

TOYS = ["gap", "sine", "moons", "banana"]


@pytest.mark.parametrize("name", TOYS)
def test_same_seed_same_toy_and_other_seed_other_toy(name):
    first, again, other = data.load(name, 3), data.load(name, 3), data.load(name, 4)
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.x_train, other.x_train)


@pytest.mark.parametrize("name", TOYS)
def test_toys_leave_the_global_generators_alone(name):
    torch.manual_seed(0)
    np_state = np.random.get_state()[1].copy()  # noqa: NPY002
    before = torch.random.get_rng_state()
    data.load(name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (np_state == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("name", TOYS)
def test_the_grid_reaches_half_the_range_beyond_the_training_data(name):
    loaded = data.load(name, dtype=torch.float64)
    low, high = loaded.x_train.min(0).values, loaded.x_train.max(0).values
    torch.testing.assert_close(loaded.grid.min(0).values, low - (high - low) / 2)
    torch.testing.assert_close(loaded.grid.max(0).values, high + (high - low) / 2)
    assert np.prod(loaded.grid_shape) == len(loaded.grid)
    assert len(loaded.grid_shape) == loaded.num_features


def test_two_dimensional_grids_unfold_with_the_second_input_along_rows():
    loaded = data.load("moons", dtype=torch.float64)
    rows = loaded.grid.reshape(*loaded.grid_shape, 2)
    assert (rows[0, :, 1] == rows[0, 0, 1]).all()
    assert (rows[:, 0, 0] == rows[0, 0, 0]).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_toy_has_no_training_input_in_its_gap_and_test_inputs_there(seed):
    loaded = data.load("gap", seed, dtype=torch.float64)
    train, test = (loaded.inputs_original(x)[:, 0] for x in (loaded.x_train, loaded.x_test))
    assert not ((train > -0.7) & (train < 0.5)).any()
    assert ((train >= -1) & (train <= 1)).all()
    # 60 % of [-1, 1]: 120 of 200 expected, standard deviation 7.
    assert 85 < int(((test > -0.7) & (test < 0.5)).sum()) < 155


@pytest.mark.parametrize(
    ("name", "function", "noise"), [("gap", lambda x: np.cos(4 * x + 0.8), 0.1), ("sine", lambda x: np.sin(2 * x), 0.2)]
)
def test_curves_have_the_stated_function_and_noise(name, function, noise):
    loaded = data.load(name, dtype=torch.float64)
    inputs = loaded.inputs_original(loaded.x_test)[:, 0].numpy()
    residual = loaded.targets_original()[1].numpy() - function(inputs)
    # 200 residuals: the standard error of their standard deviation is 5 %.
    assert residual.std() == pytest.approx(noise, rel=0.25)
    assert abs(residual.mean()) < 5 * noise / np.sqrt(200)


@pytest.mark.parametrize("name", ["moons", "banana"])
def test_class_toys_are_balanced_and_not_linearly_separable(name):
    loaded = data.load(name, dtype=torch.float64)
    labels = torch.cat([loaded.y_train, loaded.y_test])
    inputs = torch.cat([loaded.x_train, loaded.x_test])
    assert labels.dtype == torch.int64
    assert loaded.class_names == ("0", "1")
    assert loaded.num_classes == 2
    assert int(labels.sum()) == 150
    features = torch.cat([inputs, torch.ones(300, 1)], dim=1)
    fit = torch.linalg.lstsq(features, 2.0 * labels[:, None] - 1).solution
    linear = (((features @ fit)[:, 0] > 0) == (labels == 1)).double().mean()
    distance = torch.cdist(inputs, inputs).fill_diagonal_(torch.inf)
    neighbour = (labels[distance.argmin(1)] == labels).double().mean()
    assert linear < 0.93
    assert neighbour > linear + 0.02


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(data.DataError, match="gap has the splits 0 to 19; got 20"):
        data.load("gap", 20)
