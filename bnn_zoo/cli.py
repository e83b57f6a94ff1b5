"""The command line ``bnn-zoo``; every command is a few lines over the functions of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bnn_zoo import help_texts
from bnn_zoo import options as opt
from bnn_zoo.budgets import NINE, make_backends, parse_backends
from bnn_zoo.columns import lookup, terminal_tables, written
from bnn_zoo.errors import UsageError
from bnn_zoo.listing import app as list_app
from bnn_zoo.listing import data_app
from bnn_zoo.single import check_command, diagnose_command, fit_command, predict_command

app = typer.Typer(
    name="bnn-zoo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    help="Which approximation of a Bayesian network's posterior should I use, what does it cost, can I trust it?",
    epilog="Start with: `bnn-zoo compare --data energy --budget demo --out runs/energy`",
)
app.add_typer(list_app, name="list")
app.add_typer(data_app, name="data")


@app.command(help=help_texts.COMPARE)
@opt.explained
def compare(
    data: opt.DataName = None,
    csv: opt.Csv = None,
    target: opt.Target = None,
    task: opt.TaskName = None,
    missing: opt.Missing = "refuse",
    constant: opt.Constant = "refuse",
    ignore: opt.Ignore = "",
    test_fraction: opt.TestFraction = 0.1,
    split: opt.Split = "0",
    model: opt.Model = "mlp",
    hidden: opt.Hidden = "50",
    activation: opt.Activation = "tanh",
    prior: opt.Prior = "normal:fan_in",
    backends: Annotated[
        str, typer.Option(metavar="NAMES", help="Backends, comma separated, see `bnn-zoo list backends`.")
    ] = ",".join(NINE),
    reference: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure distances to this backend; default: nuts or hmc where they run."),
    ] = None,
    budget: opt.Budget = "standard",
    changes: opt.Changes = None,
    seed: opt.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where tables, report, plots and posteriors go; runs/ and the data's name if left out."
        ),
    ] = None,
    threads: opt.Threads = 1,
    overwrite: opt.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished comparison; this is the default.")
    ] = False,
) -> None:
    """Fit several backends to one model on one data set and say which to trust."""
    from bnn_zoo.compare import Comparison, Interrupted
    from bnn_zoo.compare import compare as run
    from bnn_zoo.report import write_report

    if overwrite and resume:
        raise UsageError("--overwrite starts anew and --resume goes on: give one of them")
    names = parse_backends(backends)
    if reference is not None and reference != "none":
        (reference,) = parse_backends(reference)[:1]
        names = tuple(dict.fromkeys((*names, reference)))
    elif reference is None:
        reference = next((name for name in ("nuts", "hmc") if name in names), None)
    spec = opt.data_spec(data, csv, target, task, missing, constant, ignore, test_fraction, split)
    out = out or Path("runs") / (data or (csv.stem if csv is not None else "comparison"))
    what = Comparison(
        data=spec,
        model=opt.model_spec(model, hidden, activation, prior),
        backends=make_backends(names, budget, changes or []),
        reference=None if reference == "none" else reference,
        seed=seed,
        budget=budget,
        threads=threads,
        out=out,
    )
    notes = opt.console(stderr=True)
    num = len(names)

    def listen(event: str, name: str, row: dict[str, Any]) -> None:
        place = f"[{names.index(name) + 1}/{num}] {name}"
        if event == "start":
            notes.print(escape(f"{place} ..."))
        elif event == "failed":
            notes.print(f"{escape(place)} [red]failed[/red]: {escape(row['error']['message'])}")
        else:
            quality = "scores.rmse" if "rmse" in row["scores"] else "scores.accuracy"
            text = f"{quality.removeprefix('scores.')} {written(lookup(row, quality), '3g')}"
            text = f"{text}, NLL {written(row['scores']['nll'], '3f')}, {row['cost']['seconds']:.1f} s"
            notes.print(f"{escape(place)} {'kept from before' if event == 'reuse' else 'done'}: {text}")

    try:
        results = run(what, overwrite=overwrite, listen=listen)
    except Interrupted as err:
        notes.print(f"\ninterrupted; what was finished is in {escape(str(out))}. The same command goes on from there.")
        raise typer.Exit(130) from err
    screen = opt.console()
    for table in terminal_tables(results):
        screen.print()
        screen.print(table)
    for row in results["rows"]:
        if row["status"] == "failed":
            screen.print(
                f"[red]{row['backend']} failed[/red]: {escape(row['error']['type'])}: {escape(row['error']['message'])}"
            )
    report = write_report(out, results, what.data.load())
    screen.print(f"\nThe report, with plots and warnings: {escape(str(report))}")


app.command(name="fit", help=help_texts.FIT)(opt.explained(fit_command))
app.command(name="predict", help=help_texts.PREDICT)(opt.explained(predict_command))
app.command(name="diagnose", help=help_texts.DIAGNOSE)(opt.explained(diagnose_command))
app.command(name="check", help=help_texts.CHECK)(opt.explained(check_command))

if __name__ == "__main__":
    app()
