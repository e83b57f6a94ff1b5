"""The bundled UCI tables: published sizes and splits, standardisation, original units, names."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from bnn_zoo import data
from bnn_zoo.data.convert import arrays_digest
from bnn_zoo.data.dataset import moments, standardised
from bnn_zoo.data.registry import ENTRIES, GAP_SPLITS
from bnn_zoo.data.store import read_arrays

# name: N, D, rows of the training and of the test part, first row and target of the published file
BUNDLED = {
    "energy": (768, 8, 691, 77, 0.98, 15.55),
    "yacht": (308, 6, 277, 31, -2.3, 0.11),
    "concrete": (1030, 8, 927, 103, 540.0, 79.99),
    "wine": (1599, 11, 1439, 160, 7.4, 5.0),
}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BNN_ZOO_DATA", str(tmp_path))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_tables_have_the_published_sizes(name):
    num_data, num_features, num_train, num_test, first_input, first_target = BUNDLED[name]
    loaded = data.load(name)
    assert loaded.x_train.shape == (num_train, num_features)
    assert loaded.x_test.shape == (num_test, num_features)
    assert loaded.y_train.shape == (num_train,)
    assert loaded.y_test.shape == (num_test,)
    assert len(loaded.feature_names) == num_features
    assert data.splits(name) == 20
    arrays = read_arrays(ENTRIES[name].file)
    assert arrays["X"].shape == (num_data, num_features)
    assert arrays["X"][0, 0] == first_input
    assert arrays["y"][0] == first_target


@pytest.mark.parametrize("name", BUNDLED)
def test_every_standard_split_is_a_partition(name):
    arrays = read_arrays(ENTRIES[name].file)
    assert len(arrays["train_idx"]) == len(arrays["test_idx"]) == 20
    for train, test in zip(arrays["train_idx"], arrays["test_idx"], strict=True):
        assert sorted([*train, *test]) == list(range(len(arrays["y"])))


@pytest.mark.parametrize("name", BUNDLED)
def test_standard_splits_are_the_published_permutations_of_seed_1(name):
    arrays = read_arrays(ENTRIES[name].file)
    rng = np.random.RandomState(1)
    num_data = len(arrays["y"])
    for train, test in zip(arrays["train_idx"], arrays["test_idx"], strict=True):
        order = rng.choice(range(num_data), num_data, replace=False)
        assert train.tolist() == order[: round(0.9 * num_data)].tolist()
        assert test.tolist() == order[round(0.9 * num_data) :].tolist()


@pytest.mark.parametrize("name", [*BUNDLED, "gap_splits"])
def test_bundled_files_have_both_registered_checksums(name):
    file = GAP_SPLITS if name == "gap_splits" else ENTRIES[name].file
    assert arrays_digest(read_arrays(file)) == file.arrays_sha256


def test_standardisation_uses_the_training_part_only():
    loaded = data.load("energy", split=3, dtype=torch.float64)
    arrays = read_arrays(ENTRIES["energy"].file)
    raw, raw_test = arrays["X"][arrays["train_idx"][3]], arrays["X"][arrays["test_idx"][3]]
    torch.testing.assert_close(loaded.x_train.mean(0), torch.zeros(8), atol=1e-12, rtol=0)
    torch.testing.assert_close(loaded.x_train.std(0, correction=0), torch.ones(8), atol=1e-12, rtol=0)
    torch.testing.assert_close(loaded.x_test, torch.tensor((raw_test - raw.mean(0)) / raw.std(0)))
    assert loaded.x_test.mean(0).abs().max() > 1e-3
    assert float(loaded.y_train.mean()) == pytest.approx(0, abs=1e-12)


def test_original_units_come_back():
    loaded = data.load("yacht", split=2, dtype=torch.float64)
    arrays = read_arrays(ENTRIES["yacht"].file)
    y_train, y_test = loaded.targets_original()
    torch.testing.assert_close(y_train, torch.tensor(arrays["y"][arrays["train_idx"][2]]))
    torch.testing.assert_close(y_test, torch.tensor(arrays["y"][arrays["test_idx"][2]]))
    raw = torch.tensor(arrays["X"][arrays["test_idx"][2]])
    torch.testing.assert_close(loaded.inputs_original(loaded.x_test), raw)


def test_nll_offset_is_the_change_of_units_of_a_gaussian_density():
    loaded = data.load("concrete", dtype=torch.float64)
    loc, scale = torch.tensor(0.3), torch.tensor(0.5)
    standard = torch.distributions.Normal(loc, scale).log_prob(loaded.y_test)
    original = torch.distributions.Normal(loaded.to_original(loc), loaded.scale_to_original(scale))
    in_mpa = original.log_prob(loaded.targets_original()[1])
    torch.testing.assert_close(-in_mpa, -standard + loaded.nll_offset)
    assert loaded.nll_offset == pytest.approx(math.log(loaded.y_std))


def test_constant_columns_keep_standard_deviation_one():
    values = np.stack([np.full(7, 0.998), np.arange(7.0)], axis=1)
    mean, std = moments(values)
    assert std.tolist() == [1.0, 2.0]
    arrays = {"x_train": values, "y_train": np.arange(7.0), "x_test": values[:2] + 1, "y_test": np.arange(2.0)}
    about = {"name": "", "feature_names": ("a", "b"), "target_name": "", "unit": "", "licence": "", "source": ""}
    loaded = standardised(arrays, task="regression", dtype=torch.float64, split="0", **about)
    assert loaded.x_train[:, 0].tolist() == [0.0] * 7
    assert loaded.x_test[:, 0].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("name", BUNDLED)
def test_gap_splits_hold_out_the_middle_third_of_each_feature(name):
    arrays = read_arrays(ENTRIES[name].file)
    for feature in range(arrays["X"].shape[1]):
        loaded = data.load(name, split=f"gap{feature}", dtype=torch.float64)
        train, test = (loaded.inputs_original(x)[:, feature] for x in (loaded.x_train, loaded.x_test))
        assert len(train) + len(test) == len(arrays["y"])
        assert abs(len(test) - len(arrays["y"]) / 3) <= 2
        tolerance = 1e-9 * float(test.abs().max())
        inside = (train > test.min() + tolerance) & (train < test.max() - tolerance)
        assert not inside.any()


def test_dtype_is_the_one_asked_for():
    assert data.load("yacht").x_train.dtype == torch.float32
    assert data.load("yacht", dtype=torch.float64).y_test.dtype == torch.float64


def test_unknown_names_list_close_matches():
    with pytest.raises(data.DataError, match=r"unknown data set 'enrgy': did you mean 'energy'\?"):
        data.load("enrgy")
    with pytest.raises(data.DataError, match="the data sets are energy, yacht"):
        data.splits("zzz")


@pytest.mark.parametrize("split", [20, -1, "first", "gap8", "gap"])
def test_unknown_splits_are_refused_with_the_range(split):
    with pytest.raises(data.DataError, match=r'energy has the (gap )?splits (0 to 19, or )?"gap0" to "gap7"'):
        data.load("energy", split=split)


def test_split_numbers_may_be_digits():
    assert torch.equal(data.load("yacht", split="4").x_test, data.load("yacht", split=4).x_test)


def test_available_says_where_each_set_comes_from():
    listed = {info.name: info for info in data.available()}
    assert listed["energy"].where == "bundled"
    assert listed["gap"].where == "made here"
    assert listed["boston"].where == "download"
    assert (listed["energy"].num_data, listed["energy"].num_features, listed["energy"].gap_splits) == (768, 8, 8)
    assert all(info.licence and info.source for info in listed.values())


def test_the_repr_is_one_line():
    assert repr(data.load("yacht")) == (
        "Dataset('yacht', split='0', regression of 'residuary_resistance', 277 + 31 rows, 6 inputs)"
    )


def test_metadata_is_json():
    record = json.loads(json.dumps(data.load("wine", split=1).metadata()))
    assert (record["num_train"], record["num_test"], record["split"]) == (1439, 160, "1")


def test_the_preprocessor_of_a_table_gives_its_test_inputs():
    loaded = data.load("energy", dtype=torch.float64)
    frame = pd.DataFrame(loaded.inputs_original(loaded.x_test).numpy(), columns=list(loaded.feature_names))
    torch.testing.assert_close(loaded.preprocessor.transform(frame, torch.float64), loaded.x_test)
    assert loaded.preprocessor.y_std == loaded.y_std
