"""Every data set of a full cache: collected only where `BNN_ZOO_DATA` is set (see conftest)."""

import hashlib

import numpy as np
import pytest
import torch

from bnn_zoo import data
from bnn_zoo.data.convert import arrays_digest
from bnn_zoo.data.registry import ENTRIES
from bnn_zoo.data.store import read_arrays

# name: D, splits, rows of the training and of the test part
PUBLISHED = {
    "boston": (13, 20, 455, 51),
    "kin8nm": (8, 20, 7373, 819),
    "naval": (16, 20, 10741, 1193),
    "power": (4, 20, 8611, 957),
    "protein": (9, 5, 41157, 4573),
    "mnist": (784, 1, 60000, 10000),
    "fashion_mnist": (784, 1, 60000, 10000),
    "notmnist": (784, 1, 0, 5000),
    "cifar10_test": (3072, 1, 0, 10000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sets_of_the_cache_have_the_published_sizes(name):
    num_features, num_splits, num_train, num_test = PUBLISHED[name]
    loaded = data.load(name)
    assert loaded.x_train.shape == (num_train, num_features)
    assert loaded.x_test.shape == (num_test, num_features)
    assert (len(loaded.y_train), len(loaded.y_test)) == (num_train, num_test)
    assert data.splits(name) == num_splits
    assert ENTRIES[name].num_data == num_train + num_test
    assert torch.isfinite(loaded.x_test).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_the_cache_have_both_registered_checksums(name):
    file = ENTRIES[name].file
    assert hashlib.sha256((data.cache_dir() / file.path).read_bytes()).hexdigest() == file.sha256
    assert arrays_digest(read_arrays(file)) == file.arrays_sha256


@pytest.mark.parametrize("name", [name for name in PUBLISHED if ENTRIES[name].kind == "table"])
def test_every_standard_split_of_the_cache_is_a_partition(name):
    arrays = read_arrays(ENTRIES[name].file)
    assert len(arrays["train_idx"]) == ENTRIES[name].splits
    for train, test in zip(arrays["train_idx"], arrays["test_idx"], strict=True):
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(arrays["y"])))


def test_the_constant_features_of_naval_are_zeros_with_standard_deviation_one():
    loaded = data.load("naval", split=5)
    for feature in (8, 11):
        assert float(loaded.x_std[feature]) == 1.0
        assert not loaded.x_train[:, feature].any()
        assert not loaded.x_test[:, feature].any()
    assert data.load("naval", split="gap3").x_train.isfinite().all()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_training_pixels_have_mean_zero_and_standard_deviation_one(name):
    loaded = data.load(name)
    # The published moments have four digits.
    assert float(loaded.x_train.mean()) == pytest.approx(0, abs=1e-3)
    assert float(loaded.x_train.std()) == pytest.approx(1, abs=1e-3)
    assert loaded.input_shape == (1, 28, 28)
    assert loaded.num_classes == 10
