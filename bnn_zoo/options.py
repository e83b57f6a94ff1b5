"""Options that several commands share, and how errors of the user end: one line on stderr, code 2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bnn_zoo.data import DataError
from bnn_zoo.errors import UsageError
from bnn_zoo.models import ModelSpec, parse_hidden
from bnn_zoo.tasks import DataSpec
from inference.errors import CapabilityError, UnsupportedModelError

_DATA, _MODEL, _FITTING = "Data", "Model", "Fitting"

DataName = Annotated[
    str | None, typer.Option("--data", metavar="NAME", help="Data set, see `bnn-zoo list data`.", rich_help_panel=_DATA)
]
Csv = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Your own table instead, with a header line.", rich_help_panel=_DATA)
]
Target = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of the CSV to predict.", rich_help_panel=_DATA)
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="TASK", help="regression or classification, if the guess is wrong.", rich_help_panel=_DATA
    ),
]
Missing = Annotated[
    str, typer.Option(metavar="CHOICE", help="Rows with missing values: refuse or drop.", rich_help_panel=_DATA)
]
Constant = Annotated[
    str, typer.Option(metavar="CHOICE", help="Columns with one value: refuse or drop.", rich_help_panel=_DATA)
]
Ignore = Annotated[
    str,
    typer.Option(metavar="COLUMNS", help="Columns of the CSV to leave out, comma separated.", rich_help_panel=_DATA),
]
TestFraction = Annotated[
    float, typer.Option(metavar="SHARE", help="Rows of the CSV kept for the test.", rich_help_panel=_DATA)
]
Split = Annotated[
    str, typer.Option(metavar="SPLIT", help="0, 1, ... or gap0, gap1, ...; a CSV's is its seed.", rich_help_panel=_DATA)
]
Model = Annotated[str, typer.Option(metavar="NAME", help="Model, see `bnn-zoo list models`.", rich_help_panel=_MODEL)]
Hidden = Annotated[
    str, typer.Option(metavar="WIDTHS", help="Hidden layers, such as 50 or 50,50.", rich_help_panel=_MODEL)
]
Activation = Annotated[str, typer.Option(metavar="NAME", help="tanh, relu, silu, ...", rich_help_panel=_MODEL)]
Prior = Annotated[
    str,
    typer.Option(
        metavar="PRIOR",
        help="normal:fan_in, normal:0.5; also laplace, student_t, logistic, scale_mixture, hierarchical.",
        rich_help_panel=_MODEL,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of every fit.", rich_help_panel=_FITTING)]
Budget = Annotated[
    str,
    typer.Option(
        metavar="BUDGET", help="demo, standard or long: how much each backend may do.", rich_help_panel=_FITTING
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="BACKEND.FIELD=VALUE",
        help="One hyperparameter, such as nuts.num_samples=500; repeatable.",
        rich_help_panel=_FITTING,
    ),
]
Threads = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="CPU threads; small networks are fastest on one.", rich_help_panel=_FITTING),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def data_spec(
    name: str | None,
    csv: Path | None,
    target: str | None,
    task: str | None,
    missing: str,
    constant: str,
    ignore: str,
    test_fraction: float,
    split: str,
) -> DataSpec:
    """The data that the options name.

    Args:
        name: See :data:`DataName`; likewise the others.
        csv: Path.
        target: Column.
        task: Task.
        missing: Choice.
        constant: Choice.
        ignore: Columns.
        test_fraction: Share.
        split: Split.

    Returns:
        What to load.
    """
    return DataSpec(
        name=name,
        csv=csv,
        target=target,
        task=task,
        missing=missing,
        constant=constant,
        ignore=tuple(column.strip() for column in ignore.split(",") if column.strip()),
        test_fraction=test_fraction,
        split=split,
    )


def model_spec(name: str, hidden: str, activation: str, prior: str) -> ModelSpec:
    """The model that the options name.

    Args:
        name: Model.
        hidden: Widths.
        activation: Activation.
        prior: Prior.

    Returns:
        What to build.
    """
    return ModelSpec(name=name, hidden=parse_hidden(hidden), activation=activation, prior=prior)


def console(*, stderr: bool = False) -> Console:
    """A console that does not cut tables when its output goes to a file or a pipe."""
    found = Console(stderr=stderr, highlight=False, soft_wrap=stderr)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found = Console(stderr=stderr, highlight=False, soft_wrap=stderr, width=200)
    return found


def explained(command: Callable[..., Any]) -> Callable[..., Any]:
    """Show what a user got wrong as one line on stderr, and end with code 2.

    Args:
        command: A command.

    Returns:
        The same command.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (UsageError, DataError, UnsupportedModelError, CapabilityError) as err:
            typer.echo(f"error: {' '.join(str(err).split())}", err=True)
            raise typer.Exit(2) from err

    return run
