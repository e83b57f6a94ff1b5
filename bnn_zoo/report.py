"""``report.html``: one page that needs nothing else, with tables, plots and warnings, for phones and for dark rooms."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from bnn_zoo.columns import Column, best_rows, columns_for, lookup, written
from bnn_zoo.data import Dataset
from bnn_zoo.findings import findings
from bnn_zoo.plot_calibration import calibration_plot
from bnn_zoo.plot_comparison import distance_plot, pareto_plot, rhat_plot, trace_plot
from bnn_zoo.plot_predictive import predictive_plot, shared_limits
from bnn_zoo.plot_style import Plot
from bnn_zoo.run_folder import RunFolder, replace
from inference.registry import BACKENDS

_GROUPS = (
    ("prediction", "Predictions"),
    ("trust", "Trust"),
    ("cost", "Cost"),
)


@dataclass(frozen=True)
class ReportTable:
    """One table of the page.

    Attributes:
        name: For its anchor.
        title: Headline.
        columns: Its columns.
        rows: One per backend: name, whether it is the reference, and cells as (text, is it the best).
        floor: Cells of the noise floor; empty where there is none.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[tuple[str, bool, list[tuple[str, bool]]]]
    floor: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Card:
    """One backend on the page.

    Attributes:
        row: Its row of the results.
        bias: What the method gets wrong by design.
        plots: Its plots.
    """

    row: dict[str, Any]
    bias: str
    plots: list[Plot]


def write_report(out: Path, results: dict[str, Any], data: Dataset) -> Path:
    """Draw all plots and write the page.

    Args:
        out: Directory of the comparison.
        results: Content of its ``results.json``.
        data: Its data set.

    Returns:
        Path of the page.
    """
    folder, plots = RunFolder(out), out / "plots"
    done = [row for row in results["rows"] if row["status"] == "done"]
    arrays = {row["backend"]: folder.arrays(row["backend"]) for row in done}
    limits = shared_limits(arrays, data)
    cards = []
    for row in done:
        held = arrays[row["backend"]]
        drawn = [
            predictive_plot(plots, row["backend"], held, data, limits),
            calibration_plot(plots, row["backend"], held),
        ]
        cards.append(Card(row, BACKENDS[row["backend"]].bias, drawn))
    chains = _chain_backend(results, arrays)
    together = [distance_plot(plots, results), pareto_plot(plots, results)]
    if chains:
        together += [
            rhat_plot(plots, chains, arrays[chains]),
            trace_plot(plots, chains, arrays[chains], results["data"]),
        ]
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            settings=results["settings"],
            data=results["data"],
            findings=findings(results),
            tables=_tables(results, done),
            plots=[plot for plot in together if plot is not None],
            cards=cards,
            failed=[row for row in results["rows"] if row["status"] == "failed"],
        )
    )
    file = out / "report.html"
    replace(file, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return file


def _tables(results: dict[str, Any], done: list[dict[str, Any]]) -> list[ReportTable]:
    tables = []
    for group, title in _GROUPS:
        columns = [c for c in columns_for(results["data"]["task"]) if c.group == group]
        columns = [c for c in columns if any(lookup(row, c.path) is not None for row in done)]
        if not columns:
            continue
        best = {column.path: best_rows(done, column) for column in columns}
        rows = []
        for row in done:
            name = row["backend"]
            cells = [(written(lookup(row, c.path), c.form), name in best[c.path]) for c in columns]
            rows.append((name, name == results["settings"]["reference"], cells))
        floor: list[str] = []
        if group == "trust" and results["noise_floor"]:
            known = {f"distance.{key}": value for key, value in results["noise_floor"].items()}
            floor = [written(known[c.path], c.form) if c.path in known else "" for c in columns]
        tables.append(ReportTable(group, title, columns, rows, floor))
    return tables


def _chain_backend(results: dict[str, Any], arrays: dict[str, Any]) -> str | None:
    """Whose chains to show: the reference's, or else those of the first backend that has any."""
    with_chains = [name for name, held in arrays.items() if "trace" in held]
    reference = results["settings"]["reference"]
    return reference if reference in with_chains else next(iter(with_chains), None)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnn_zoo", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["snug"] = lambda text: text.replace("_", "_\u200b")  # lets long names break
    return environment
