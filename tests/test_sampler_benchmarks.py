"""The benchmark of samplers: the same density on all sides, what is written, and what the page makes of it."""

import json

import numpy as np
import pytest
import torch

from benchmarks.samplers import page
from benchmarks.samplers.__main__ import contestants, main, merged
from benchmarks.samplers.contest import judge
from benchmarks.samplers.posteriors import POSTERIORS
from inference import compile_target

SMALL = ("energy", "logistic", "schools", "gaussian")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    main(["gaussian", "--quick", "--fits", "2", "--out", str(folder)])
    return json.loads((folder / "gaussian.json").read_text())


def test_a_quick_run_writes_every_fit(record):
    (contestant,) = record["contestants"]
    assert (contestant["label"], len(contestant["fits"]), record["not_run"]) == ("NUTS, 1 chains", 2, {})
    for fit in contestant["fits"]:
        assert 0 < fit["sampling_seconds"] <= fit["seconds"]
        assert fit["gradients"] >= 40
        assert len(fit["mean"]) == len(fit["sd"]) == 10


def test_the_page_leaves_the_first_fit_out_of_the_figures_without_compilation(record):
    assert "| NUTS, 1 chains |" in page.render([record])
    fits = record["contestants"][0]["fits"]
    slow = fits[0] | {"ess_per_second": 1e9}
    altered = record | {"contestants": [record["contestants"][0] | {"fits": [slow, *fits[1:]]}]}
    assert page.render([altered]) == page.render([record])


@pytest.mark.parametrize("name", SMALL)
def test_a_model_has_the_functions_that_are_judged(name):
    torch.set_default_dtype(torch.float32)
    posterior = POSTERIORS[name]()
    x, y = (torch.from_numpy(posterior.arrays[key]) for key in ("x", "y"))
    target = compile_target(posterior.model, x, y)
    draws = target.sample_prior(6, seed=0)
    values = posterior.functions(target.unravel(draws))
    assert values.shape[0] == 6
    one = posterior.functions(target.unravel(draws[2:3]))
    assert torch.allclose(values[2:3], one, atol=1e-5)


def test_r_hat_of_one_chain_is_that_of_its_halves():
    drifting = np.linspace(0.0, 1.0, 200)[None, :, None] + 0.01 * np.random.default_rng(0).normal(size=(1, 200, 1))
    answer = {"seconds": 2.0, "sampling_seconds": 1.0, "gradients": 100.0, "divergences": 0, "values": drifting}
    assert judge(answer)["rhat"] > 1.5


def test_the_page_counts_differences_in_their_standard_errors(record):
    (ours,) = record["contestants"]
    fit = ours["fits"][0]
    moved = fit | {"mean": [m + 3 * 2**0.5 * e for m, e in zip(fit["mean"], fit["mean_error"], strict=True)]}
    reference = ours | {"label": page.REFERENCE, "fits": [fit]}
    other = ours | {"label": "moved", "fits": [moved]}
    text = page.render([record | {"contestants": [reference, other]}])
    assert "at 10 function values" in text
    assert "| moved | 3.0 | 0.0 |" in text
    assert all(0 < e < sd for e, sd in zip(fit["mean_error"], fit["sd"], strict=True))


def test_contestants_that_are_measured_later_are_added_and_named(record):
    (ours,) = record["contestants"]
    other, again = ours | {"label": "other"}, ours | {"fits": ours["fits"][:1]}
    before = record | {"contestants": [ours, other], "not_run": {ours["label"]: "stopped"}, "note": "Quiet."}
    after = merged(before, record | {"contestants": [again], "note": ""})
    assert [(c["label"], len(c["fits"])) for c in after["contestants"]] == [("NUTS, 1 chains", 1), ("other", 2)]
    assert after["not_run"] == {}
    assert after["note"] == "Quiet. Measured in a run of their own, not in turn with the others: NUTS, 1 chains."


def test_every_network_gets_the_same_depth_for_all():
    line_up = [c for c in contestants("energy", False, 1) if "depth" not in c.label]
    assert {c.options["max_tree_depth"] for c in line_up if "max_tree_depth" in c.options} == {6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense"], "no posterior 'nonsense'"), (["--quick"], "needs --out"), (["--fits", "0"], "at least 1")],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
