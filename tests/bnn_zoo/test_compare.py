"""The main job on a toy with tiny budgets: rows, files, failures, interruptions, refusals."""

import json
import math
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pytest
import torch

from bnn_zoo.columns import best_rows, columns_for, written
from bnn_zoo.compare import Interrupted, compare
from bnn_zoo.data import load
from bnn_zoo.errors import UsageError
from bnn_zoo.models import ModelSpec
from bnn_zoo.run_folder import RunFolder, first_difference, plain
from bnn_zoo.saved import open_run
from inference import MAP, MeanFieldVI
from tests.bnn_zoo.tiny import comparison

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "sine"
    return out, compare(comparison(out))


def without_cost(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what a clock or the memory of the machine decides."""
    rows = [{k: v for k, v in row.items() if k not in ("cost", "netcdf")} for row in results["rows"]]
    return {**results, "rows": rows}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def test_results_file_holds_what_compare_returns_and_only_strict_json(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    held = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    assert held == json.loads(json.dumps(plain(results)))
    assert all(math.isfinite(leaf) for leaf in leaves(held) if isinstance(leaf, float))


def test_every_row_has_scores_costs_and_a_repr_that_re_creates_its_backend(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    results = finished[1]
    assert [row["backend"] for row in results["rows"]] == ["map", "mean_field_vi", "nuts"]
    assert results["rows"][0]["hyperparameters"] == repr(MAP(num_steps=60, compile=False))
    expected = {c.path.split(".")[1] for c in columns_for("regression") if c.path.startswith("scores.")}
    for row in results["rows"]:
        assert row["status"] == "done"
        assert expected <= row["scores"].keys()
        assert row["cost"]["gradients"] > 0
        assert row["cost"]["seconds"] > 0
    nuts = results["rows"][2]
    assert nuts["diagnosis"]["rhat_functions_95"] > 0
    assert "distance" not in nuts
    assert {"wasserstein1", "variance_ratio"} <= results["rows"][0]["distance"].keys()
    assert results["noise_floor"]["wasserstein1"] > 0


def test_log_evidence_is_in_original_units(finished: tuple[Path, dict[str, Any]]) -> None:
    data = load("sine")
    row = finished[1]["rows"][1]
    shift = len(data.y_train) * math.log(data.y_std)
    assert row["log_evidence"] == pytest.approx(row["extra"]["elbo"] - shift)


def test_results_name_versions_seed_threads_and_no_machine(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["settings"] == {"seed": 0, "budget": "demo", "reference": "nuts", "threads": 1}
    texts = [leaf for leaf in leaves(results) if isinstance(leaf, str)]
    assert not [text for text in texts if str(out) in text or socket.gethostname() == text]


def test_netcdf_files_are_read_by_arviz_and_agree_with_the_saved_posterior(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder = RunFolder(finished[0])
    posterior = open_run(folder.posterior_path("nuts")).posterior
    idata = az.from_netcdf(folder.arviz_path("nuts"))
    stored = idata["posterior"]["layers.0.weight"].to_numpy()
    np.testing.assert_allclose(stored, posterior.target.unravel(posterior.draws)["layers.0.weight"].numpy())
    assert {"posterior_predictive", "log_likelihood", "sample_stats"} <= set(idata.groups())


def test_saved_posterior_predicts_what_the_row_was_scored_with(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, data = RunFolder(finished[0]), load("sine")
    mean = open_run(folder.posterior_path("map")).posterior.predict(data.x_test).mean
    np.testing.assert_allclose(data.to_original(mean.double()).numpy(), folder.arrays("map")["mean"], rtol=1e-5)


def test_failing_backend_is_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MAP, target: Any, run: Any) -> None:
        raise RuntimeError("the optimiser\nfell over")

    monkeypatch.setattr(MAP, "fit_target", fail)
    results = compare(comparison(tmp_path / "out", backends="map,mean_field_vi"))
    assert [row["status"] for row in results["rows"]] == ["failed", "done"]
    assert results["rows"][0]["error"] == {"type": "RuntimeError", "message": "the optimiser fell over"}


def test_failed_backend_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MAP, "fit_target", lambda self, target, run: 1 / 0)
        compare(comparison(tmp_path / "out", backends="map"))
    assert compare(comparison(tmp_path / "out", backends="map"))["rows"][0]["status"] == "done"


def test_interrupted_and_resumed_comparison_equals_an_uninterrupted_one(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: MeanFieldVI, target: Any, run: Any) -> None:
        raise KeyboardInterrupt

    out, events = tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(MeanFieldVI, "fit_target", interrupt)
        with pytest.raises(Interrupted):
            compare(comparison(out))
    assert sorted(file.name for file in (out / "rows").glob("*.json")) == ["map.json"]
    results = compare(comparison(out), listen=lambda event, name, row: events.append((event, name)))
    assert events[:2] == [("reuse", "map"), ("start", "mean_field_vi")]
    assert without_cost(results) == without_cost(finished[1])
    for name in ("map", "mean_field_vi", "nuts"):
        mine, theirs = RunFolder(out).arrays(name), RunFolder(finished[0]).arrays(name)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


def test_time_limit_of_a_sampler_is_a_failed_row_and_not_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(self: MAP, target: Any, run: Any) -> None:
        raise KeyboardInterrupt("max_seconds=1 ended the run before every chain had a draw")

    monkeypatch.setattr(MAP, "fit_target", run_out)
    (row,) = compare(comparison(tmp_path / "out", backends="map"))["rows"]
    assert row["status"] == "failed"
    assert "max_seconds=1" in row["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"model": ModelSpec(hidden=(6,))}, r"model hidden \[5\], not \[6\]"),
        ({"data": "gap"}, "data name 'sine', not 'gap'"),
        ({"changed": {"map": MAP(num_steps=7)}}, r"map as MAP\(.*num_steps=60.*, not MAP\(.*num_steps=7"),
    ],
)
def test_other_comparison_in_the_directory_is_refused_with_the_first_difference(
    finished: tuple[Path, dict[str, Any]], changes: dict[str, Any], difference: str
) -> None:
    before = (finished[0] / "results.json").read_bytes()
    with pytest.raises(UsageError, match=difference):
        compare(comparison(finished[0], **changes))
    assert (finished[0] / "results.json").read_bytes() == before


def test_overwrite_replaces_another_comparison(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    results = compare(comparison(out, backends="map", seed=1), overwrite=True)
    assert [row["seed"] for row in results["rows"]] == [1]
    assert not (out / "rows" / "nuts.json").exists()


def test_backend_can_be_added_to_a_finished_comparison(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    results = compare(comparison(out, backends="deep_ensemble", reference="nuts"))
    assert [row["backend"] for row in results["rows"]] == ["map", "mean_field_vi", "nuts", "deep_ensemble"]
    assert "distance" in results["rows"][3]


def test_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds files that are no comparison"):
        compare(comparison(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_damaged_row_is_a_clear_error(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    (out / "rows" / "map.json").write_text('{"status": "do')
    with pytest.raises(UsageError, match=r"map\.json is not readable"):
        compare(comparison(out))


def test_first_difference_ignores_backends_that_only_one_request_has() -> None:
    before = {"seed": 0, "backends": {"map": "MAP()", "nuts": "NUTS()"}}
    assert first_difference(before, {"seed": 0, "backends": {"map": "MAP()", "svgd": "SVGD()"}}) is None


def test_infinite_and_missing_figures_are_written_so_that_json_holds_them() -> None:
    assert plain({"a": [math.inf, -math.inf, math.nan, np.float32(2)], "b": (1, None)}) == {
        "a": ["inf", "-inf", None, 2.0],
        "b": [1, None],
    }
    assert (written(None, "3f"), written("inf", "2f"), written(0.9481, "%")) == ("–", "inf", "94.8 %")


def test_best_value_is_the_lowest_or_highest_and_ties_are_shared() -> None:
    rows = [{"backend": n, "scores": {"nll": v, "accuracy": v}} for n, v in (("a", 0.5), ("b", 0.50001), ("c", 0.9))]
    low = next(c for c in columns_for("classification") if c.path == "scores.nll")
    high = next(c for c in columns_for("classification") if c.path == "scores.accuracy")
    assert best_rows(rows, low) == {"a", "b"}
    assert best_rows(rows, high) == {"c"}


def test_wide_model_repr_does_not_hide_the_likelihood(finished: tuple[Path, dict[str, Any]]) -> None:
    assert re.search(r"HalfNormal\(1\)", finished[1]["model"]["likelihood"])
