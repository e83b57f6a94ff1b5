"""`bnn-zoo check --sbc`: verdicts against what each method promises, the files it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bnn_zoo import sbc as sbc_module
from bnn_zoo.cli import app
from bnn_zoo.errors import UsageError
from bnn_zoo.sbc import LEVEL, Row, details, overview, problem, promises_exactness, run
from inference import MAP, NUTS
from inference.registry import BACKENDS
from inference.sbc import Calibration, Replicate
from inference.uniformity import uniformity


def row(name: str, model: str, pit: np.ndarray, failures: tuple[str, ...] = ()) -> Row:
    replicates = tuple(Replicate(p, 99, float("nan"), 0.1, ()) for p in pit)
    names = ("w", "f[0]", "log likelihood")
    ranks = Calibration(names, pit, replicates, failures)
    tests = tuple(uniformity(scalar, pit[:, i]) for i, scalar in enumerate(names))
    return Row(name, BACKENDS[name].cls(), model, ranks, tests)


def ranks(power: float = 1.0) -> np.ndarray:
    """Uniform ranks, or ranks pushed up."""
    return np.random.default_rng(0).random((100, 3)) ** power


def test_verdicts_follow_from_the_ranks_and_from_what_the_method_promises() -> None:
    assert row("nuts", "mlp", ranks()).verdict == "uniform"
    assert row("nuts", "mlp", ranks(0.4)).verdict == "NOT UNIFORM"
    assert row("mean_field_vi", "linear", ranks(0.4)).verdict == "fails as expected"
    assert row("mean_field_vi", "linear", ranks()).verdict == "no deviation seen"
    assert row("nuts", "mlp", ranks(), failures=("replicate 3: nan",)).verdict == "NOT UNIFORM"
    assert row("mean_field_vi", "linear", ranks(0.4)).why() == BACKENDS["mean_field_vi"].bias
    assert "it promises the exact posterior" in row("hmc", "linear", ranks(0.4)).why()
    assert row("nuts", "mlp", ranks(0.4)).pvalue < LEVEL


def test_laplace_promises_the_linear_posterior_only_and_samplers_both() -> None:
    assert promises_exactness("dense_laplace", "linear")
    assert not promises_exactness("dense_laplace", "mlp")
    for name in ("nuts", "hmc"):
        assert promises_exactness(name, "linear")
        assert promises_exactness(name, "mlp")
    for name in ("map", "mean_field_vi", "svgd", "deep_ensemble", "swag", "diagonal_laplace"):
        assert not promises_exactness(name, "linear")


def test_short_runs_are_settings_that_the_backends_have() -> None:
    for fields in (sbc_module._LINEAR, sbc_module._MLP):
        for name in fields:
            sbc_module.make_backends([name], {}, sbc_module.defaults([name], "mlp"))
            assert name in BACKENDS


def test_the_command_says_what_is_wrong_with_a_point_and_writes_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sbc_module, "_MIN_REPLICATES", 20)
    monkeypatch.delenv("COLUMNS", raising=False)
    out = tmp_path / "sbc"
    arguments = ["check", "--sbc", "--backends", "map", "--replicates", "20", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--set", "map.num_steps=50", "--set", "map.compile=False"])
    assert result.exit_code == 0, result.output
    assert ["map", "fails", "as", "expected"] in [line.split()[:4] for line in result.stdout.splitlines()]
    assert "map: 20 of 20 replicates" in result.stderr
    (written,) = json.loads((out / "sbc.json").read_text())
    assert written["backend"] == "map"
    assert written["scalars"][0]["shape"] == "too narrow"
    assert np.load(out / "ranks.npz")["map"].shape == (20, 8)
    for name in ("sbc.png", "sbc-dark.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_an_exact_method_that_is_not_uniform_ends_with_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sbc_module, "run", lambda *args, **options: [row("nuts", "linear", ranks(0.4))])
    monkeypatch.delenv("COLUMNS", raising=False)
    result = CliRunner().invoke(app, ["check", "nuts", "--sbc", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "NOT UNIFORM" in result.stdout


def test_tables_have_one_line_per_backend_and_per_scalar() -> None:
    rows = [row("nuts", "linear", ranks()), row("map", "linear", ranks(0.4))]
    assert overview(rows).row_count == 2
    assert details(rows).row_count == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check"], "name a backend, as in `bnn-zoo check nuts`"),
        (["check", "nuts", "--backends", "map", "--sbc"], "not both"),
        (["check", "nuts", "--out", "there"], "belong to --sbc"),
        (["check", "nuts", "--sbc", "--model", "cnn"], "--model must be one of linear, mlp with --sbc, got 'cnn'"),
        (["check", "nuts", "--sbc", "--replicates", "5"], "--replicates must be at least 40, got 5"),
        (["check", "--sbc", "--backends", "nust"], "did you mean nuts"),
        (["check", "map", "--sbc", "--set", "map.steps=3"], "MAP has no 'steps'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_code_2(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--model must be one of linear, mlp"):
        problem("cnn")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["nuts", "hmc"])
def test_samplers_are_uniform_on_linear_regression_and_on_a_small_network(name: str, model: str) -> None:
    (found,) = run([name], model, num_replicates=200)
    assert found.verdict == "uniform", found.why()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["map", "mean_field_vi", "diagonal_laplace", "deep_ensemble", "svgd", "swag"])
def test_methods_with_a_bias_are_seen_to_fail(name: str) -> None:
    (found,) = run([name], "linear", num_replicates=100)
    assert found.verdict == "fails as expected"


def test_names_of_other_samplers_are_taken_from_the_registry() -> None:
    assert isinstance(sbc_module.make_backends(["nuts"], {}, sbc_module.defaults(["nuts"], "linear"))["nuts"], NUTS)
    assert isinstance(sbc_module.make_backends(["map"], {})["map"], MAP)
