"""The command line as its users meet it: CSV end to end, tables, and errors of one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from bnn_zoo.budgets import make_backends
from bnn_zoo.cli import app
from bnn_zoo.data import available
from inference import NUTS
from inference.registry import BACKENDS
from tests.bnn_zoo.tiny import settings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def bnn_zoo(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that must end with code 2."""
    result = bnn_zoo(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Price = 1000 + 30 area + 200 (town), without noise to speak of."""
    rng = np.random.default_rng(0)
    area, place = rng.uniform(50, 150, 200), rng.choice(["town", "village"], 200)
    price = 1000 + 30 * area + 200 * (place == "town") + rng.normal(0, 5, 200)
    file = tmp_path_factory.mktemp("csv") / "houses.csv"
    pd.DataFrame({"area": area, "place": place, "price": price}).to_csv(file, index=False)
    return file


@pytest.fixture(scope="module")
def fitted(houses: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fits") / "houses"
    options = ("--csv", houses, "--target", "price", "--model", "linear", "--out", out)
    result = bnn_zoo("fit", "dense_laplace", *options, "--set", "dense_laplace.start.num_steps=300")
    assert result.exit_code == 0, result.output
    assert "in original units" in result.stdout
    return out


def test_new_rows_of_a_csv_are_predicted_in_original_units_and_order(fitted: Path, tmp_path: Path) -> None:
    new = pd.DataFrame({"place": ["village", "town", "town"], "id": [7, 8, 9], "area": [140.0, 60.0, 100.0]})
    new.to_csv(tmp_path / "new.csv", index=False)
    result = bnn_zoo("predict", fitted, tmp_path / "new.csv", "--out", tmp_path / "out.csv", "--level", 0.8)
    assert result.exit_code == 0, result.output
    found = pd.read_csv(tmp_path / "out.csv")
    np.testing.assert_allclose(found["mean"], [5200, 3000, 4200], atol=5)
    np.testing.assert_allclose(found["stddev"], 5, rtol=0.25)
    # 80 % of a normal distribution lie within 1.2816 standard deviations.
    np.testing.assert_allclose(found["upper"] - found["lower"], 2 * 1.2816 * found["stddev"], rtol=0.02)
    assert (found["epistemic_stddev"] < found["stddev"]).all()


def test_predictions_go_to_standard_output_as_csv(fitted: Path, houses: Path) -> None:
    result = bnn_zoo("predict", fitted, houses)
    assert result.stdout.splitlines()[0] == "mean,stddev,lower,upper,epistemic_stddev"
    assert len(result.stdout.splitlines()) == 201


def test_labels_of_a_csv_get_probabilities_that_sum_to_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=120)
    frame = pd.DataFrame({"x": x, "kind": np.where(x > 0, "yes", "no")})
    frame.to_csv(tmp_path / "kinds.csv", index=False)
    options = ("--csv", tmp_path / "kinds.csv", "--target", "kind", "--hidden", 4, "--out", tmp_path / "run")
    assert bnn_zoo("fit", "map", *options, *settings("map")).exit_code == 0
    assert bnn_zoo("predict", tmp_path / "run", tmp_path / "kinds.csv", "--out", tmp_path / "p.csv").exit_code == 0
    found = pd.read_csv(tmp_path / "p.csv")
    np.testing.assert_allclose(found["p(no)"] + found["p(yes)"], 1, atol=1e-5)
    assert (found["label"] == frame["kind"]).mean() > 0.9


def test_compare_on_a_csv_prints_tables_and_writes_a_report(houses: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["compare", "--csv", houses, "--target", "price", "--hidden", 4, "--backends", "map,deep_ensemble"]
    arguments += ["--out", out, *settings("map,deep_ensemble")]
    result = bnn_zoo(*arguments)
    assert result.exit_code == 0, result.output
    assert "deep_ensemble" in result.stdout
    assert "RMSE" in result.stdout
    assert str(out / "report.html") in result.stdout.replace("\n", "")
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"map", "deep_ensemble"}
    assert "kept from before" in bnn_zoo(*arguments, "--resume").stderr
    assert "seed 0, not 1" in refused(*arguments, "--seed", 1)


def test_reference_is_fitted_even_if_it_is_not_among_the_backends(tmp_path: Path) -> None:
    arguments = ["compare", "--data", "moons", "--hidden", 4, "--backends", "map", "--reference", "deep_ensemble"]
    result = bnn_zoo(*arguments, "--out", tmp_path / "run", *settings("map,deep_ensemble"))
    assert "deep_ensemble (ref.)" in result.stdout
    assert "TV to ref." in result.stdout


def test_diagnose_prints_the_figures_of_a_saved_run(fitted: Path) -> None:
    result = bnn_zoo("diagnose", fitted)
    assert result.exit_code == 0
    assert result.stdout.startswith("DenseLaplace: ")
    assert "khat" in result.stdout


COMPARE = ("compare", "--backends", "map", "--out", "never")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("compare", "--data", "energy", "--backends", "map,nust", "--out", "never"), "did you mean nuts"),
        ((*COMPARE, "--data", "enery"), "did you mean 'energy'"),
        ((*COMPARE, "--data", "energy", "--model", "mpl"), "did you mean 'mlp'"),
        ((*COMPARE, "--data", "energy", "--activation", "tahn"), "did you mean 'tanh'"),
        ((*COMPARE, "--data", "energy", "--prior", "normal:wide"), "must be a number or fan_in"),
        ((*COMPARE, "--data", "energy", "--prior", "normal:-1"), "a positive number"),
        ((*COMPARE, "--data", "energy", "--hidden", "50x50"), "--hidden must be widths"),
        ((*COMPARE, "--data", "energy", "--budget", "lnog"), "did you mean 'long'"),
        ((*COMPARE, "--data", "energy", "--set", "map.num_step=5"), "did you mean 'num_steps'"),
        ((*COMPARE, "--data", "energy", "--set", "map.num_steps=-5"), "`num_steps` must be an integer >= 1, got -5"),
        ((*COMPARE, "--data", "energy", "--set", "nuts.num_samples=5"), "'nuts' is not in this comparison"),
        (("fit", "nuts", "--data", "energy", "--out", "never", "--set", "nuts.num_chains=1"), "`allow_one_chain=True`"),
        ((*COMPARE, "--data", "energy", "--set", "num_steps"), "must look like nuts.num_samples=500"),
        ((*COMPARE, "--data", "energy", "--split", "99"), "99"),
        ((*COMPARE, "--data", "energy", "--overwrite", "--resume"), "give one of them"),
        ((*COMPARE, "--data", "moons", "--model", "heteroscedastic_mlp"), "needs a regression"),
        (COMPARE, "give either --data NAME or --csv FILE"),
        ((*COMPARE, "--csv", "houses.csv"), "needs --target COLUMN"),
        ((*COMPARE, "--csv", "houses.csv", "--target", "price"), "no file houses.csv"),
        (("fit", "map", "--data", "energy", "--out", "never", "--set", "map.start.x=1"), "has no 'start'"),
        (("predict", "never", "new.csv"), "no saved posterior in never"),
        (("diagnose", "never"), "no saved posterior in never"),
        (("check", "laplace"), "no backend is called 'laplace'"),
        (("data", "get", "enery"), "did you mean 'energy'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_code_2(
    arguments: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in refused(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", [1, -1])
def test_changes_that_are_possible_together_only_may_come_in_any_order(order: int) -> None:
    changes = ["nuts.num_chains=1", "nuts.allow_one_chain=True", "nuts.num_samples=7"][::order]
    assert make_backends(["nuts"], {}, changes)["nuts"] == NUTS(num_chains=1, allow_one_chain=True, num_samples=7)


def test_saved_runs_and_predictions_are_not_replaced_unasked(fitted: Path, houses: Path, tmp_path: Path) -> None:
    options = ("--csv", houses, "--target", "price", "--model", "linear", "--out", fitted)
    assert "holds a saved posterior already" in refused("fit", "map", *options)
    taken = tmp_path / "p.csv"
    taken.write_text("mine")
    assert "exists already" in refused("predict", fitted, houses, "--out", taken)
    assert taken.read_text() == "mine"


def test_new_rows_that_do_not_fit_are_named(fitted: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    pd.DataFrame({"area": [80.0], "place": ["moon"]}).to_csv(file, index=False)
    assert "moon" in refused("predict", fitted, file)
    pd.DataFrame({"aera": [80.0], "place": ["town"]}).to_csv(file, index=False)
    assert "'area'" in refused("predict", fitted, file)
    pd.DataFrame({"area": [80.0], "place": ["town"]}).to_csv(file, index=False)
    assert "--level must be between 0 and 1" in refused("predict", fitted, file, "--level", 90)


def test_missing_values_of_a_csv_are_refused_or_dropped_by_choice(houses: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(houses)
    frame.loc[3, "area"] = np.nan
    frame.to_csv(tmp_path / "holes.csv", index=False)
    options = ("--csv", tmp_path / "holes.csv", "--target", "price", "--model", "linear", "--out", tmp_path / "run")
    assert "missing" in refused("fit", "map", *options)
    assert bnn_zoo("fit", "map", *options, "--missing", "drop", *settings("map")).exit_code == 0


def test_lists_name_everything_in_copyable_lines() -> None:
    lines = bnn_zoo("list", "backends", "--tsv").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines[1:]] == list(BACKENDS)
    lines = bnn_zoo("data", "list", "--tsv").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines[1:]] == [entry.name for entry in available()]
    table = bnn_zoo("list", "backends", "--tsv").stdout
    assert all(entry.bias in table for entry in BACKENDS.values())
    words = bnn_zoo("list", "backends").stdout.split()  # wrapped to the width of the terminal
    assert all(word in words for entry in BACKENDS.values() for word in entry.bias.split()[:1])


def test_installed_command_explains_itself_and_its_errors() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bnn_zoo.cli"]
    shown = subprocess.run([*command, "compare", "--help"], capture_output=True, text=True, check=True)
    assert "--csv houses.csv --target price" in shown.stdout
    wrong = subprocess.run([*command, "fit", "nust", "--out", "never"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no backend is called 'nust'; did you mean nuts")
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-m", "bnn_zoo.cli", "compare", "--data", "energy", "--out", str(out)]
    command += [
        "--backends",
        "map,nuts",
        "--budget",
        "long",
        "--set",
        "map.num_steps=50",
        "--set",
        "nuts.compile=False",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stderr is not None
        while "nuts ..." not in run.stderr.readline():
            assert run.poll() is None
        time.sleep(5)  # into the warm-up, where the sampler itself would answer Ctrl-C with its draws
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
    assert run.returncode == 130
    assert "The same command goes on from there" in rest
    assert [file.name for file in (out / "rows").glob("*.json")] == ["map.json"]


def test_one_line_compares_on_a_csv_and_names_its_folder_after_it(
    houses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--csv", houses, "--target", "price", "--model", "linear", "--backends", "map")
    result = bnn_zoo("compare", *options, *settings("map"))
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "runs" / "houses" / "results.json").read_text())
    assert [row["backend"] for row in figures["rows"]] == ["map"]
    assert (tmp_path / "runs" / "houses" / "report.html").exists()
