"""The columns of a comparison: where each figure is, how it is written, which way is better; and the tables of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

Better = Literal["low", "high", None]


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
        path: Where it is in a row, such as "scores.rmse".
        title: Head of the column.
        form: "3f" for three decimals, "%" for a percentage, "seconds", "count", "bytes".
        help: What it is, for the report.
        better: Whether the best value is low, high, or neither.
        group: "prediction", "trust" or "cost".
        only: "regression", "classification", or both when empty.
    """

    path: str
    title: str
    form: str
    help: str
    better: Better = None
    group: str = "prediction"
    only: str = ""


COLUMNS = (
    Column(
        "scores.rmse", "RMSE", "3g", "root mean squared error of the mean, original units", "low", only="regression"
    ),
    Column("scores.accuracy", "accuracy", "%", "share of right labels", "high", only="classification"),
    Column("scores.nll", "NLL", "3f", "negative log density of the mixture, nats per datum, original units", "low"),
    Column(
        "scores.nll_gaussian",
        "NLL Gauss.",
        "3f",
        "the same for the Gaussian with the mixture's mean and variance (published tables mix the two)",
        "low",
        only="regression",
    ),
    Column(
        "scores.crps", "CRPS", "3g", "continuous ranked probability score, original units", "low", only="regression"
    ),
    Column(
        "scores.brier",
        "Brier",
        "3f",
        "squared error of the probabilities, summed over classes",
        "low",
        only="classification",
    ),
    Column("scores.ece", "ECE", "3f", "expected calibration error, 15 bins", "low", only="classification"),
    Column(
        "scores.ece_baseline",
        "ECE if calibrated",
        "3f",
        "mean ECE of the same probabilities if labels were drawn from them: what is not miscalibration",
        only="classification",
    ),
    Column("scores.coverage_50", "in 50 %", "%", "targets inside the central 50 % interval", only="regression"),
    Column("scores.width_50", "width 50 %", "3g", "mean width of that interval, original units", only="regression"),
    Column("scores.coverage_90", "in 90 %", "%", "targets inside the central 90 % interval", only="regression"),
    Column("scores.width_90", "width 90 %", "3g", "mean width of that interval, original units", only="regression"),
    Column(
        "scores.epistemic_share",
        "epistemic",
        "%",
        "share of the predictive variance (or entropy) that is uncertainty about the weights",
    ),
    Column(
        "distance.wasserstein1",
        "W1 to ref.",
        "3g",
        "Wasserstein distance to the reference's predictive distribution, mean over test inputs, original units",
        "low",
        "trust",
        "regression",
    ),
    Column(
        "distance.variance_ratio",
        "variance / ref.",
        "2f",
        "predictive variance over that of the reference, median over test inputs: below 1 too sure",
        None,
        "trust",
        "regression",
    ),
    Column(
        "distance.epistemic_ratio",
        "epist. / ref.",
        "2f",
        "epistemic variance over that of the reference, median over test inputs",
        None,
        "trust",
        "regression",
    ),
    Column("distance.agreement", "agreement", "%", "same label as the reference", "high", "trust", "classification"),
    Column(
        "distance.total_variation",
        "TV to ref.",
        "3f",
        "total variation distance to the reference's probabilities, mean over test inputs",
        "low",
        "trust",
        "classification",
    ),
    Column(
        "diagnosis.rhat_functions_95",
        "R-hat 95 %",
        "3f",
        "95 % quantile over test inputs of the rank-normalised split R-hat of f; above 1.1 the chains disagree",
        None,
        "trust",
    ),
    Column(
        "diagnosis.ess_bulk_functions_median", "ESS", "count", "median bulk effective sample size of f", None, "trust"
    ),
    Column("diagnosis.divergences", "diverg.", "count", "divergent draws", None, "trust"),
    Column(
        "diagnosis.khat",
        "k-hat",
        "2f",
        "Pareto tail index of posterior over approximation; above 0.7 off",
        None,
        "trust",
    ),
    Column("log_evidence", "log evid.", "1f", "log evidence or its bound, nats, original units", None, "trust"),
    Column(
        "cost.gradients", "gradients", "count", "gradient evaluations, in passes over the training data", None, "cost"
    ),
    Column("cost.seconds", "seconds", "seconds", "wall time of the fit", None, "cost"),
    Column("cost.peak_bytes", "memory", "bytes", "highest memory above that before the fit", None, "cost"),
)


def columns_for(task: str) -> list[Column]:
    """The columns of a task.

    Args:
        task: "regression" or "classification".

    Returns:
        Those that apply.
    """
    return [column for column in COLUMNS if column.only in ("", task)]


def lookup(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, or None.

    Args:
        row: One row of the results.
        path: Such as "scores.rmse".

    Returns:
        The value.
    """
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any, missing: float = float("inf")) -> float:
    """A figure of a results file as a number.

    Args:
        value: Number, "inf", "-inf", or None.
        missing: What None becomes.

    Returns:
        The number.
    """
    return missing if value is None else float(value)


def written(value: Any, form: str) -> str:
    """A figure as text.

    Args:
        value: Number, "inf", or None.
        form: See :class:`Column`.

    Returns:
        Short text; a dash where there is no figure.
    """
    if value is None:
        return "–"
    if isinstance(value, str) or value in (float("inf"), float("-inf")):
        return str(value)
    if form == "%":
        return f"{100 * value:.1f} %"
    if form == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if form == "seconds":
        return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
    if form == "count":
        return f"{value:,.0f}"
    if form == "3g":
        return f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"
    return f"{value:,.{form[0]}f}"


def best_rows(rows: list[dict[str, Any]], column: Column) -> set[str]:
    """Names of the backends with the best value of a column, ties as written included.

    Args:
        rows: The finished rows.
        column: The column.

    Returns:
        Backend names; empty where nothing is better or worse.
    """
    values = {row["backend"]: lookup(row, column.path) for row in rows}
    numbers = {name: number(value) for name, value in values.items() if value is not None}
    if column.better is None or len(numbers) < 2:
        return set()
    best = (min if column.better == "low" else max)(numbers.values())
    return {name for name, value in numbers.items() if written(value, column.form) == written(best, column.form)}


def terminal_tables(results: dict[str, Any]) -> list[Table]:
    """The results for a terminal: predictions first, then what to trust and what it cost.

    Args:
        results: Content of ``results.json``.

    Returns:
        Two tables, best values in bold; a row for the noise floor and a line for every failure.
    """
    rows, task = results["rows"], results["data"]["task"]
    done = [row for row in rows if row["status"] == "done"]
    tables = []
    for title, groups in (("How good are the predictions?", ("prediction",)), ("Trust and cost", ("trust", "cost"))):
        columns = [c for c in columns_for(task) if c.group in groups]
        columns = [c for c in columns if any(lookup(row, c.path) is not None for row in done)]
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        table.add_column("backend")
        for column in columns:
            table.add_column(column.title, justify="right")
        for row in rows:
            name = row["backend"] + (" (ref.)" if row["backend"] == results["settings"]["reference"] else "")
            if row["status"] != "done":
                table.add_row(f"[red]{name}[/red]", "[red]failed[/red]")
                continue
            table.add_row(name, *(_cell(row, column, done) for column in columns))
        floor = results["noise_floor"]
        if floor and "trust" in groups:
            known = [written(floor.get(c.path.removeprefix("distance.")), c.form) for c in columns]
            table.add_row("[dim]noise floor[/dim]", *(f"[dim]{text if text != '–' else ''}[/dim]" for text in known))
        tables.append(table)
    return tables


def _cell(row: dict[str, Any], column: Column, done: list[dict[str, Any]]) -> str:
    text = written(lookup(row, column.path), column.form)
    return f"[bold]{text}[/bold]" if row["backend"] in best_rows(done, column) else text
