"""``bnn-zoo list`` and ``bnn-zoo data``: what there is, as tables that can be copied."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from bnn_zoo import data as data_sets
from bnn_zoo.errors import usage
from bnn_zoo.models import MODELS, PRIORS
from bnn_zoo.options import console, explained
from inference.registry import BACKENDS

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="What there is: data sets, models, backends.")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="List data sets, or download one.")

Tsv = Annotated[bool, typer.Option("--tsv", help="Tab-separated values, for a spreadsheet or a script.")]


@app.command(name="backends")
@explained
def list_backends(tsv: Tsv = False) -> None:
    """Every posterior approximation, what it needs and what it gets wrong."""
    rows = [
        [e.name, e.family, ", ".join(sorted(e.needs)), ", ".join(sorted(e.capabilities)), e.bias]
        for e in BACKENDS.values()
    ]
    _show(["backend", "family", "needs", "can do", "what it gets wrong"], rows, tsv=tsv)


@app.command(name="models")
@explained
def list_models(tsv: Tsv = False) -> None:
    """Models for --model and priors for --prior."""
    rows = [["model", name, text] for name, text in MODELS.items()]
    rows += [["prior", name, text.replace("`", "")] for name, text in PRIORS.items()]
    _show(["option", "name", "what it is"], rows, tsv=tsv)


@app.command(name="data")
@explained
def list_data(tsv: Tsv = False) -> None:
    """Data sets, with where they would come from on this machine."""
    head = ["name", "task", "kind", "rows", "inputs", "splits", "gap splits", "where", "licence"]
    rows = [
        [
            d.name,
            d.task,
            d.kind,
            str(d.num_data),
            str(d.num_features),
            str(d.splits),
            str(d.gap_splits),
            d.where,
            d.licence,
        ]
        for d in data_sets.available()
    ]
    _show(head, rows, tsv=tsv)


data_app.command(name="list")(list_data)


@data_app.command(name="get")
@explained
def get(name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `bnn-zoo list data`.")]) -> None:
    """Download a data set into the cache (its checksum is verified); nothing to do for bundled ones.

    **Example**

    - `bnn-zoo data get kin8nm`
    """
    with usage():
        data_sets.fetch(name)
        data = data_sets.load(name)
    console().print(f"{data!r} is here. Unit: {data.unit or 'none'}; licence: {data.licence}", markup=False)


def _show(head: list[str], rows: list[list[str]], *, tsv: bool) -> None:
    if tsv:
        for row in [head, *rows]:
            typer.echo("\t".join(row))
        return
    table = Table(*head, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    console().print(table, markup=False)
