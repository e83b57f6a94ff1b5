"""BACKENDS, the one list of every backend, holds what the README, the command line and the other tests read from it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import inference
from inference import BACKENDS, Backend, Subset, find_backend
from inference.registry import snake_case

NEEDS = {"gradients", "layers", "full batch"}
CAPABILITIES = {"log_density", "log_evidence", "minibatches", "temperature", "chains"}
FOLDER = Path(inference.__file__).parent
# "Liu and Wang 2016", "MacKay 1992; Daxberger et al. 2021"
REFERENCE = re.compile(r"[A-Z][\w'-]+( et al\.| and [A-Z][\w'-]+)? \d{4}[a-z]?")


@pytest.fixture(params=BACKENDS)
def entry(request):
    return BACKENDS[request.param]


def concrete_backends() -> set[type[Backend]]:
    """Every public backend class that stands for itself (Subset wraps another)."""
    public = {value for name, value in vars(inference).items() if inspect.isclass(value) and not name.startswith("_")}
    return {cls for cls in public if issubclass(cls, Backend)} - {Backend, Subset}


def test_the_list_holds_every_public_backend_once():
    assert {e.cls for e in BACKENDS.values()} == concrete_backends()
    assert len({e.cls for e in BACKENDS.values()}) == len(BACKENDS)


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("MAP", "map"),
        ("MeanFieldVI", "mean_field_vi"),
        ("NUTS", "nuts"),
        ("SWAG", "swag"),
        ("DeepEnsemble", "deep_ensemble"),
        ("DenseLaplace", "dense_laplace"),
        ("PyroGuideVI", "pyro_guide_vi"),
        ("PyroMCMC", "pyro_mcmc"),
        ("MultiSWAG", "multi_swag"),
    ],
)
def test_class_names_become_snake_case(class_name, name):
    assert snake_case(class_name) == name


def test_a_backend_is_listed_under_its_class_in_snake_case(entry):
    assert entry.name == snake_case(entry.cls.__name__)
    assert BACKENDS[entry.name] is entry


def test_a_backend_is_found_by_either_name(entry):
    assert find_backend(entry.name) is entry
    assert find_backend(entry.cls.__name__) is entry


@pytest.mark.parametrize(
    ("typo", "meant"), [("nutz", "nuts"), ("MeanField", "mean_field_vi"), ("deep_ensembles", "deep_ensemble")]
)
def test_a_misspelt_name_gets_the_nearest_ones(typo, meant):
    with pytest.raises(ValueError, match=rf"no backend is called '{typo}'; did you mean .*{meant}"):
        find_backend(typo)


def test_a_name_like_no_other_gets_the_whole_list():
    with pytest.raises(ValueError, match="no backend is called 'xyzzy'") as caught:
        find_backend("xyzzy")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in BACKENDS)


def test_a_family_is_the_folder_the_backend_lives_in(entry):
    folder = Path(inspect.getfile(entry.cls)).parent
    assert folder.parent == FOLDER
    assert entry.family == folder.name


def test_the_expected_bias_is_one_line_of_prose(entry):
    assert 20 <= len(entry.bias) <= 120
    assert "\n" not in entry.bias
    assert not entry.bias.endswith(".")


def test_a_reference_is_authors_and_year(entry):
    for reference in entry.reference.split("; "):
        assert REFERENCE.fullmatch(reference), reference


def test_needs_and_capabilities_are_of_the_documented_words(entry):
    assert entry.needs
    assert entry.needs <= NEEDS
    assert entry.capabilities <= CAPABILITIES


def test_what_needs_the_full_batch_offers_no_minibatches(entry):
    assert not ("full batch" in entry.needs and "minibatches" in entry.capabilities)


def test_the_entry_says_what_the_class_says(entry):
    for field in ("family", "bias", "reference", "needs", "capabilities"):
        assert getattr(entry, field) == getattr(entry.cls, field)


def test_every_hyperparameter_is_documented_in_its_class(entry):
    inherited = "\n".join(inspect.getdoc(cls) or "" for cls in entry.cls.__mro__ if issubclass(cls, Backend))
    missing = [name for name in entry.cls.field_names() if not re.search(rf"^\s*{name}: ", inherited, re.MULTILINE)]
    assert not missing
