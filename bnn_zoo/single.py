"""Commands on one posterior: ``fit``, ``predict``, ``diagnose`` and ``check``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from bnn_zoo import options as opt
from bnn_zoo.budgets import make_backends, parse_backends
from bnn_zoo.data import read_csv
from bnn_zoo.errors import UsageError, usage

Backend = Annotated[str, typer.Argument(metavar="BACKEND", help="A name of `bnn-zoo list backends`.")]
SavedPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory that `fit` or `compare` wrote.")]


def fit_command(
    backend: Backend,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the posterior is saved.")],
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
    budget: opt.Budget = "standard",
    changes: opt.Changes = None,
    seed: opt.Seed = 0,
    threads: opt.Threads = 1,
    overwrite: opt.Overwrite = False,
) -> None:
    """Fit one backend and save its posterior."""
    from bnn_zoo.evaluate import evaluate
    from bnn_zoo.saved import check_new, save_run

    (name,) = parse_backends(backend)[:1]
    made = make_backends([name], budget, changes or [])[name]
    spec = opt.model_spec(model, hidden, activation, prior)
    check_new(out, overwrite=overwrite)
    loaded = opt.data_spec(data, csv, target, task, missing, constant, ignore, test_fraction, split).load()
    torch.set_num_threads(threads)
    with usage(f"{name}: "):
        posterior = made.fit(spec.build(loaded), loaded.x_train, loaded.y_train, seed=seed)
    save_run(out, posterior, spec, loaded, overwrite=overwrite)
    scores = evaluate(posterior, loaded, seed).scores
    quality = "rmse" if "rmse" in scores else "accuracy"
    typer.echo(
        f"{made!r}\ntest {quality} {scores[quality]:.4g}, NLL {scores['nll']:.4g} nats per datum, in original units; "
        f"{posterior.info.seconds:.1f} s, {posterior.info.gradients:,.0f} gradients\nsaved to {out}"
    )


def predict_command(
    run: SavedPath,
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="New rows, with the columns it was fitted to.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="CSV to write; standard output if left out.")] = None,
    level: Annotated[float, typer.Option(metavar="P", help="Probability inside the interval lower..upper.")] = 0.9,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
) -> None:
    """Predict new rows with a saved posterior."""
    from bnn_zoo.saved import open_run, predict_table

    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"{out} exists already; give another --out, or --overwrite to replace it")
    table = predict_table(open_run(run), read_csv(csv), level, seed)
    if out is None:
        table.to_csv(sys.stdout, index=False)
        return
    with usage("cannot write: "):
        table.to_csv(out, index=False)
    typer.echo(f"{len(table)} rows written to {out}")


def diagnose_command(run: SavedPath) -> None:
    """Say whether a saved posterior is to be trusted."""
    from bnn_zoo.saved import open_run

    typer.echo(str(open_run(run).posterior.diagnose()))


def check_command(
    backend: Backend,
    changes: opt.Changes = None,
    seed: opt.Seed = 0,
) -> None:
    """Hold a backend to a posterior known in closed form."""
    from bnn_zoo.check import check

    (name,) = parse_backends(backend)[:1]
    result = check(name, changes or [], seed)
    console = opt.console()
    console.print(result.table())
    console.print(result.verdict_line())
    if result.verdict == "wrong":
        raise typer.Exit(1)
