"""Laplace on UCI data: which fits are planned, what a record holds, and what the page makes of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import report, uci_laplace, uci_laplace_page
from benchmarks.reference import SCORES, Fit
from bnn_zoo.data import load
from bnn_zoo.data.registry import GAP_SPLITS
from bnn_zoo.data.store import read_arrays
from bnn_zoo.evaluate import evaluate
from bnn_zoo.models import ModelSpec
from inference import MAP, NUTS, DenseLaplace, SampledLaplace, Subset

SMALL = ModelSpec(hidden=(2,))
SHORT = MAP(num_steps=50)
QUICK = {
    "map": SHORT,
    "last_layer": Subset(DenseLaplace(start=None), sites="layers.1.*", rest=None),
    "dense": DenseLaplace(start=None),
    "sampled_em": SampledLaplace(num_samples=4, em_rounds=2, groups="all", learn_noise=True, start=None),
    "nuts": NUTS(num_samples=8, warmup_steps=8, num_chains=4, max_tree_depth=2),
}


@pytest.fixture(scope="module")
def records():
    torch.set_default_dtype(torch.float32)
    fits = uci_laplace.planned(("yacht",), 1, False, QUICK, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(uci_laplace.ROWS, "map", SHORT)  # where the others start
        patch.setitem(uci_laplace.ROUNDS, "dense", 2)
        return {fit.name: uci_laplace.run(replace(fit, start="random")) for fit in fits}


def test_every_record_holds_scores_costs_and_moments_of_its_predictions(records):
    for record in records.values():
        assert set(record["scores"]) == set(SCORES)
        assert record["gradients"] > 0
        assert all(len(record["predictions"][name]) == record["num_test"] for name in uci_laplace.MOMENTS)
        assert record["constant_nll"] > record["scores"]["nll"]
    assert set(records["nuts"]["predictions"]) == {
        f"{half}{name}" for half in ("", "half0_", "half1_") for name in uci_laplace.MOMENTS
    }


def test_rows_that_are_tuned_say_what_was_chosen(records):
    dense, last = records["dense"], records["last_layer"]
    assert set(dense["prior_scales"]) == {f"layers.{i}.{what}" for i in (0, 1) for what in ("weight", "bias")}
    assert set(last["prior_scales"]) == {"layers.1.weight", "layers.1.bias"}
    assert (len(dense["rounds"]), len(last["rounds"])) == (2, 1)
    for record in (dense, last):
        assert record["rounds"][-1] == record["log_evidence"]
        assert record["noise"] > 0
    assert records["sampled_em"]["noise"] != records["sampled_em"]["noise_at_mode"]
    assert records["sampled_em"]["log_evidence"] is None


def test_the_noise_that_evidence_chooses_is_larger_than_that_of_the_mode(records):
    assert records["dense"]["noise"] > records["sampled_em"]["noise_at_mode"]


def test_a_gap_split_has_a_record_without_predictions():
    torch.set_default_dtype(torch.float32)
    record = uci_laplace.run(Fit("yacht", "gap0", "map", MAP(num_steps=20), SMALL))
    assert record["split"] == "gap0"
    assert "predictions" not in record


def test_a_limit_that_ends_the_warm_up_is_a_record_of_failure():
    torch.set_default_dtype(torch.float32)
    sampler = NUTS(num_samples=5, warmup_steps=100_000, num_chains=4, max_seconds=0.5)
    record = uci_laplace.run(Fit("yacht", 0, "nuts", sampler, SMALL, start="random"))
    assert "ended the run before every chain had a draw" in record["failed"]
    assert "scores" not in record


def test_all_data_sets_come_before_the_next_gap():
    fits = uci_laplace.planned(("energy", "naval"), None, True, {"map": MAP()}, SMALL)
    names = [fit.file_name for fit in fits]
    assert names[:3] == ["energy-gap0-map.json", "naval-gap0-map.json", "energy-gap2-map.json"]
    assert len(names) == 7 + 5
    assert [fit.split for fit in uci_laplace.planned(("yacht",), 2, False, {"map": MAP()}, SMALL)] == [0, 1]


@pytest.mark.parametrize("name", uci_laplace.GAPS)
def test_the_gaps_listed_differ_and_every_other_gap_is_one_of_them(name):
    packed = read_arrays(GAP_SPLITS)[f"{name}_test_mask"]
    listed = {packed[j].tobytes() for j in uci_laplace.GAPS[name]}
    assert len(listed) == len(uci_laplace.GAPS[name])
    assert listed == {mask.tobytes() for mask in packed}


def test_the_constant_prediction_scores_as_a_normal_distribution_of_the_training_targets():
    data = load("yacht", dtype=torch.float64)
    train, test = data.targets_original()
    normal = torch.distributions.Normal(train.mean(), train.std(correction=0))
    assert uci_laplace.constant_nll(data) == pytest.approx(-float(normal.log_prob(test).mean()), abs=1e-10)


def fake(row: str, split: int | str, nll: float, *, data: str = "energy", shift: float = 0.0) -> dict[str, Any]:
    """A record of three test inputs whose predictions are those of NUTS, moved by ``shift``."""
    moments = {"mean": [1.0 + shift, 2.0 + shift, 3.0 + shift], "stddev": [0.5] * 3, "epistemic_stddev": [0.1] * 3}
    if row == "nuts":
        moments |= {f"half{i}_{name}": values for i in (0, 1) for name, values in list(moments.items())}
        moments["half1_mean"] = [1.25, 2.25, 3.25]
    return {
        "data": data,
        "split": split,
        "backend": row,
        "settings": f"{row}()",
        "environment": {"processor": "p", "threads": 1, "python": "3", "versions": {"torch": "2"}},
        "cpu_seconds": 1.0,
        "load": [0.5, 1.5],
        "scores": dict.fromkeys(SCORES, 1.0) | {"nll": nll, "nll_stderr": 0.1, "coverage_90": 0.9},
        "constant_nll": 2.0,
        "log_evidence": -100.0,
        "mixing": {"share_below_1.1": 0.5} if row == "nuts" else None,
        "predictions": moments,
    }


def test_the_distance_to_nuts_is_that_of_normal_distributions_with_the_moments_kept():
    apart = uci_laplace_page.distances([fake("map", 0, 1.0, shift=0.5), fake("nuts", 0, 1.0), fake("dense", 1, 1.0)])
    assert apart["map"][0]["wasserstein1"] == pytest.approx(0.5, abs=1e-12)
    assert apart["map"][0]["variance_ratio"] == pytest.approx(1.0)
    assert apart["nuts"][0]["wasserstein1"] == pytest.approx(0.25, abs=1e-12)  # between the halves of the chains
    assert apart["dense"] == {}


def test_the_distance_of_moments_is_near_that_of_the_mixtures_where_those_are_nearly_normal():
    torch.set_default_dtype(torch.float32)
    data = load("yacht")
    model = SMALL.build(data)
    mode = SHORT.fit(model, data.x_train, data.y_train)
    laplace = DenseLaplace(start=None).fit(model, data.x_train, data.y_train, init=mode)
    arrays = [evaluate(posterior, data).arrays for posterior in (mode, laplace)]
    exact = uci_laplace_page.distance(*arrays)["wasserstein1"]
    kept = [uci_laplace_page.predictions({"predictions": uci_laplace.moments(a)}) for a in arrays]
    assert uci_laplace_page.distance(*kept)["wasserstein1"] == pytest.approx(exact, rel=0.1)


def test_the_page_gives_means_over_splits_and_distances_where_nuts_was_run():
    page = uci_laplace_page.render([
        fake("map", 0, 1.0, shift=0.5),
        fake("map", 1, 1.2, shift=0.5),
        fake("dense", 0, 0.9),
        fake("nuts", 0, 0.8),
    ])
    assert "| map | -1.100 ± 0.100 | 1.000 ± 0.000 | 1.00 ± 0.00 | 0.90 ± 0.00 | 0.500 | 1.00 |  |  | 0-1 | 1 |" in page
    assert "| dense | -0.900 | 1.000 | 1.00 | 0.90 | 0.000 | 1.00 |  | -100 | 0 | 1 |" in page
    assert "| nuts | -0.800 | 1.000 | 1.00 | 0.90 | 0.250 | 1.00 | 0.50 |  | 0 | 1 |" in page


def test_verdicts_compare_each_row_with_map_on_the_same_splits():
    rows = [fake("map", s, 1.0 + s, shift=0.5) for s in (0, 1)]
    good = [fake("dense", 0, 0.9), fake("dense", 1, 1.95), fake("nuts", 0, 0.8)]
    verdicts = {e.text: e.verdict for e in uci_laplace_page.expectations(rows + good)}
    (margin,) = (v for t, v in verdicts.items() if t.startswith("dense: log-likelihood"))
    assert margin == "reached: energy +0.075 ± 0.025"
    assert verdicts["dense: nearer to NUTS than MAP is, on every set"] == "reached: energy 0 against 0.5"
    bad = [fake("kronecker", 0, 1.5, shift=1.0), fake("kronecker", 1, 2.5, shift=1.0), fake("nuts", 0, 0.8)]
    verdicts = {e.text: e.verdict for e in uci_laplace_page.expectations(rows + bad)}
    (margin,) = (v for t, v in verdicts.items() if t.startswith("kronecker: log-likelihood"))
    assert margin == "missed on 1 of 1: energy -0.500 ± 0.000"
    assert verdicts["kronecker: nearer to NUTS than MAP is, on every set"].startswith("missed on 1 of 1")


def test_gaps_in_which_a_row_fails_are_counted():
    mine = [fake("dense", "gap0", 1.0), fake("dense", "gap1", 9.0)]
    rows = [fake("map", "gap0", 0.95), fake("map", "gap1", 1.0), *mine]
    assert uci_laplace_page.below_map(mine, rows) == ["gap1"]
    assert uci_laplace_page.below_constant(mine) == ["gap1"]
    page = uci_laplace_page.render([*rows, fake("dense", 0, 0.5)])
    assert "| dense | -5.00 ± 4.00 | -5.00 | -9.00 (gap1) | 0.90 ± 0.00 | 1 of 2 | 1 of 2 | -0.50 | 0-1 | 1 |" in page


def test_a_failure_is_listed_with_its_reason():
    failed = {k: v for k, v in fake("nuts", 3, 1.0).items() if k != "scores"} | {"failed": "the time ended"}
    assert "- energy, split 3, nuts: the time ended." in uci_laplace_page.render([failed, fake("map", 3, 1.0)])


def test_the_committed_page_is_the_one_its_records_give():
    records = report.load(uci_laplace.RESULTS)
    assert uci_laplace_page.PAGE.read_text() == uci_laplace_page.render(records)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--splits", "0"], "--splits and --seconds must be positive"),
        (["--data", "enrgy"], "unknown data set 'enrgy': did you mean 'energy'"),
        (["--rows", "lastlayer"], "unknown row 'lastlayer': did you mean 'last_layer'"),
        (["--hidden", "0"], "`hidden` must be widths >= 1"),
    ],
)
def test_wrong_arguments_are_refused_before_any_fit(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        uci_laplace.main([*arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit) as caught:
        uci_laplace_page.main(["--results", str(tmp_path)])
    assert caught.value.code == 2
