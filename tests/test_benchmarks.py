"""The benchmark runner: what it measures, what it writes, and what the report makes of it."""

import copy
import getpass
import json
import platform
from pathlib import Path

import pytest
import torch

from benchmarks import environments, problems, report, run
from benchmarks.leapfrog import by_hand
from benchmarks.measure import Case, Contestant, Settings, Versus, race
from benchmarks.tasks import TASKS

KEYS = {"format", "task", "title", "quick", "repeats", "seconds", "environment", "cases", "not_run"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run.main(["diagnostics", "--quick", "--repeats", "2", "--out", str(folder)])
    return json.loads((folder / "diagnostics.json").read_text())


def test_a_quick_run_writes_every_figure_of_every_repeat(record):
    assert set(record) == KEYS
    assert (record["task"], record["quick"], record["repeats"]) == ("diagnostics", True, 2)
    assert [case["case"].split(",")[0] for case in record["cases"]] == ["rhat", "ess_bulk", "ess_tail"]
    for case in record["cases"]:
        for figures in case["contestants"] + case["ratios"]:
            assert len(figures["values"]) == 2
            assert figures["min"] == min(figures["values"]) > 0
            assert figures["max"] == max(figures["values"])
            assert figures["min"] <= figures["median"] <= figures["max"]
        assert case["agreement"]["largest relative difference"] < 1e-8


def test_the_record_says_versions_and_threads_and_names_no_machine_user_or_path(record):
    environment = record["environment"]
    assert environment["threads"] == torch.get_num_threads() == 1
    assert {"torch", "pyro-ppl", "arviz"} <= set(environment["versions"])
    assert environment["versions"]["torch"] == torch.__version__
    text = json.dumps(record)
    names = [platform.node(), str(Path.cwd()), str(Path.home()), str(environments.HERE), f'"{getpass.getuser()}"']
    assert [name for name in names if name in text] == []


def test_a_ratio_is_taken_within_each_repeat():
    clocks = {"slow": iter([2.0, 9.0, 4.0]), "fast": iter([1.0, 3.0, 1.0])}
    contestants = [Contestant(name, calls=2, timer=lambda _, name=name: next(clocks[name])) for name in clocks]
    found = race(Case("c", "ms", "call", contestants, [Versus("slow", "fast", 2.5)]), repeats=3)
    assert found["contestants"][0]["values"] == [1000.0, 4500.0, 2000.0]  # 2 s for 2 calls is 1000 ms each
    (ratio,) = found["ratios"]
    assert (ratio["values"], ratio["median"], ratio["min"], ratio["max"]) == ([2.0, 3.0, 4.0], 3.0, 2.0, 4.0)


def test_everyone_goes_first_in_turn():
    order = []
    contestants = [Contestant(name, lambda name=name: order.append(name)) for name in "abc"]
    race(Case("c", "s", "call", contestants, []), repeats=3)
    assert "".join(order) == "abcbcacab"


def test_the_report_shows_losses_goals_and_what_was_not_run(record):
    changed = copy.deepcopy(record)
    changed["cases"] = changed["cases"][:1]
    changed["cases"][0]["ratios"][0] |= {"median": 0.5, "min": 0.25, "max": 0.75, "goal": 2.0}
    changed["not_run"] = [{"case": "large set", "reason": "not in the cache"}]
    page = report.render([changed])
    assert "| ArviZ / ours | 0.5 [0.25-0.75] | at least 2: missed |" in page
    assert "Not run: large set (not in the cache)." in page
    assert "these figures mean nothing" in page
    assert page.count("### ") == 1


def test_the_committed_page_is_the_one_its_results_give():
    assert report.PAGE.read_text() == report.render(report.load(report.RESULTS))


def test_committed_results_are_real_runs_of_known_tasks():
    records = report.load(report.RESULTS)
    assert {r["task"] for r in records} == set(TASKS)
    assert not any(r["quick"] for r in records)


@pytest.mark.parametrize("arguments", [["none"], ["--repeats", "0"], ["--quick"]])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2


def test_both_sides_of_a_problem_are_the_same_density():
    torch.set_default_dtype(torch.float32)
    problem = problems.energy((3,))
    target = problem.target()
    theta = target.initial(2, seed=0)
    values, gradients = target.log_density_and_grad(2)(theta)
    hand = [by_hand(problem)(t) for t in theta]
    assert problem.dim == target.dim
    assert problems.relative_difference(gradients, torch.stack([g for _, g in hand])) < 1e-5
    torch.testing.assert_close(values[1] - values[0], hand[1][0] - hand[0][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("diagnostics", "ensemble", "laplace")])
def test_cases_agree_with_their_peers(name):
    torch.set_default_dtype(torch.float32)
    (case,) = TASKS[name].cases(Settings(repeats=1, quick=True, foreign=False))
    assert case.agreement
    # The mean-field ELBOs are Monte-Carlo estimates; their standard error is a few parts in a thousand.
    assert max(case.agreement.values()) < (0.02 if name == "mean_field" else 1e-5)
    assert all(contestant.seconds() > 0 for contestant in case.contestants)


def test_a_laplace_case_needs_neither_images_nor_the_peer():
    torch.set_default_dtype(torch.float32)
    (case,) = TASKS["laplace"].cases(Settings(repeats=1, quick=True, foreign=False))
    assert [contestant.name for contestant in case.contestants] == ["ours"]
    assert case.contestants[0].seconds() > 0
