"""The UCI reference: which fits are planned, what a record holds, and what the page makes of it."""

import copy
import json
from typing import Any

import pytest
import torch

from benchmarks import reference, reference_page
from benchmarks.published import MCD_GRID, PUBLISHED
from benchmarks.report import load
from bnn_zoo.models import ModelSpec
from inference import MAP, NUTS

QUICK = ["--data", "yacht", "--splits", "1", "--backend", "map,nuts", "--start", "random", "--hidden", "2"]
SHORT = ["--set", "map.num_steps=20", "--set", "nuts.num_samples=8", "--set", "nuts.warmup_steps=8"]
TREE = ["--set", "nuts.max_tree_depth=2"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("reference")
    reference.main([*QUICK, *SHORT, *TREE, "--out", str(folder)])
    return folder, load(folder)


def test_a_record_holds_scores_mixing_cost_and_settings(records):
    _, (of_map, of_nuts) = records
    assert (of_map["backend"], of_nuts["backend"]) == ("map", "nuts")
    for record in (of_map, of_nuts):
        assert set(record["scores"]) == set(reference.SCORES)
        assert 0 <= record["scores"]["coverage_50"] <= record["scores"]["coverage_90"] <= 1
        assert record["gradients"] > 0
    assert of_map["mixing"] is None
    assert (of_nuts["mixing"]["chains"], of_nuts["mixing"]["draws"]) == (4, 8)
    assert 0 <= of_nuts["mixing"]["share_below_1.1"] <= 1
    assert "max_tree_depth=2" in of_nuts["settings"]
    assert "max_seconds=600" in of_nuts["settings"]


def test_a_record_that_exists_is_kept_and_a_missing_one_is_made(records):
    folder, before = records
    path = folder / "yacht-0-map.json"
    path.write_text(json.dumps(before[0] | {"seconds": -1.0}))
    (folder / "yacht-0-nuts.json").unlink()
    reference.main([*QUICK, *SHORT, *TREE, "--out", str(folder)])
    of_map, of_nuts = load(folder)
    assert of_map["seconds"] == -1.0
    assert of_nuts["scores"] == before[1]["scores"]
    assert not list(folder.glob("*.unfinished"))


def test_a_limit_that_ends_the_warm_up_is_a_record_of_failure():
    torch.set_default_dtype(torch.float32)
    sampler = NUTS(num_samples=5, warmup_steps=100_000, num_chains=2, max_seconds=0.5)
    record = reference.run(reference.Fit("yacht", 0, "nuts", sampler, ModelSpec(hidden=(2,)), start="random"))
    assert "ended the run before every chain had a draw" in record["failed"]
    assert "scores" not in record


def test_all_data_sets_come_before_the_next_split():
    fits = reference.planned(("energy", "yacht"), 2, {"map": MAP()}, ModelSpec(), "random")
    assert [f.file_name for f in fits] == [
        "energy-0-map.json",
        "yacht-0-map.json",
        "energy-1-map.json",
        "yacht-1-map.json",
    ]


def test_only_backends_that_know_a_limit_get_one():
    assert reference.limited(NUTS(), 7.0) == NUTS(max_seconds=7.0)
    assert reference.limited(MAP(), 7.0) == MAP()


def fake(data: str, split: int, backend: str, nll: float, coverage: float = 0.9, share: float = 1.0) -> dict[str, Any]:
    mixing = None if backend in ("map", "deep_ensemble") else {"share_below_1.1": share}
    return {
        "data": data,
        "split": split,
        "backend": backend,
        "settings": f"{backend}()",
        "start": "its own",
        "model": {"activation": "tanh", "prior": "normal:fan_in"},
        "environment": {"processor": "p", "threads": 1, "python": "3", "versions": {"torch": "2"}},
        "seconds": 1.0,
        "gradients": 1000,
        "load": [0.5, 1.5],
        "scores": dict.fromkeys(reference.SCORES, 1.0) | {"nll": nll, "coverage_90": coverage},
        "mixing": mixing,
    }


def test_the_page_gives_means_and_standard_errors_over_splits():
    page = reference_page.render([fake("wine", 0, "nuts", 1.0), fake("wine", 1, "nuts", 0.8)])
    assert "| nuts | -0.900 ± 0.100 | 1.000 ± 0.000 | 1.00 ± 0.00 | 0.90 ± 0.00 | 1.00 ± 0.00 | 0, 1 | 1 | 1 |" in page
    assert "| *MC dropout, grid search* | -0.928 ± 0.013 | 0.622 ± 0.008 |" in page
    assert all(published.source in page for published in PUBLISHED)


def test_expectations_are_marked_reached_missed_or_open():
    bar = MCD_GRID.log_likelihood["wine"][0]
    better = [fake("wine", 0, "nuts", -bar - 0.01), fake("energy", 0, "nuts", 0.5, coverage=0.97, share=0.6)]
    verdicts = {e.text: e.verdict for e in reference_page.expectations(better)}
    (against,) = (v for t, v in verdicts.items() if "MC dropout" in t)
    assert against == "open, only these were run: 2 of 2 sets run"
    assert verdicts["nuts: 90 % intervals cover 85-95 % on every set"] == "missed: energy 0.970"
    assert verdicts["nuts: chains agree at 95 % of the test inputs"] == "missed: energy 0.60"
    worse = [fake(data, 0, "nuts", 9.0) for data in ("wine", "energy", "yacht", "boston")]
    lost = [e.verdict for e in reference_page.expectations(worse) if "MC dropout" in e.text]
    assert lost[0].startswith("missed: 0 of 4 sets run; below on energy -9.000 below -1.212")
    ensemble = [fake("wine", 0, "deep_ensemble", 0.9)]
    assert [e.verdict for e in reference_page.expectations(ensemble)] == ["reached: 1 of 1 sets run"]


def test_a_failure_is_listed_with_its_reason():
    failed = copy.deepcopy(fake("wine", 3, "nuts", 1.0)) | {"failed": "the time ended"}
    del failed["scores"]
    assert "- wine, split 3, nuts: the time ended." in reference_page.render([failed])


def test_every_published_row_covers_the_same_sets():
    assert {tuple(sorted(p.log_likelihood)) for p in PUBLISHED} == {tuple(sorted(reference.DATA))}


def test_the_committed_page_is_the_one_its_records_give():
    assert reference_page.PAGE.read_text() == reference_page.render(load(reference.RESULTS))


@pytest.mark.parametrize(
    "arguments",
    [["--splits", "0"], ["--seconds", "0"], ["--backend", "nutz"], ["--data", "none"], ["--set", "nuts.x=1"]],
)
def test_wrong_arguments_are_refused_before_any_fit(arguments, tmp_path):
    with pytest.raises(SystemExit) as caught:
        reference.main([*arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert not list(tmp_path.iterdir())


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit) as caught:
        reference_page.main(["--results", str(tmp_path)])
    assert caught.value.code == 2
