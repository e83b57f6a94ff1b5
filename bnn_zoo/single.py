"""Commands on one posterior: ``fit``, ``predict``, ``diagnose`` and ``check``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from bnn_zoo import options as opt
from bnn_zoo.budgets import make_backends, parse_backends
from bnn_zoo.data import read_csv
from bnn_zoo.errors import UsageError, usage

_SBC = "Simulation-based calibration"
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


def diagnose_command(
    run: SavedPath,
    align: Annotated[bool, typer.Option("--align", help="Match hidden units before comparing weights.")] = False,
) -> None:
    """Say whether a saved posterior is to be trusted."""
    from bnn_zoo.saved import open_run

    typer.echo(str(open_run(run).posterior.diagnose(align=align)))


def check_command(
    backend: Annotated[
        str | None, typer.Argument(metavar="BACKEND", help="A name of `bnn-zoo list backends`.", show_default=False)
    ] = None,
    changes: opt.Changes = None,
    seed: opt.Seed = 0,
    sbc: Annotated[
        bool, typer.Option("--sbc", help="Simulation-based calibration instead; minutes.", rich_help_panel=_SBC)
    ] = False,
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Several backends, comma separated.", rich_help_panel=_SBC),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="linear, or mlp: a 1-10-1 network.", rich_help_panel=_SBC)
    ] = "linear",
    replicates: Annotated[
        int, typer.Option(metavar="R", help="Simulated data sets, one fit each.", rich_help_panel=_SBC)
    ] = 200,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Worker processes.", rich_help_panel=_SBC)] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where figures and plots go; runs/sbc-MODEL if left out.", rich_help_panel=_SBC
        ),
    ] = None,
) -> None:
    """Hold a backend to a posterior known in closed form, or to its own simulations."""
    if backend is not None and backends is not None:
        raise UsageError("give backends as the argument or with --backends, not both")
    if backend is None and backends is None:
        raise UsageError("name a backend, as in `bnn-zoo check nuts`; `bnn-zoo list backends` shows all")
    names = parse_backends(backend or backends or "")
    if sbc:
        _check_by_simulation(names, model, replicates, changes or [], jobs, seed, out or Path("runs") / f"sbc-{model}")
        return
    if backends is not None or out is not None:
        raise UsageError(
            "--backends and --out belong to --sbc; `bnn-zoo check nuts` holds one backend to a closed form"
        )
    from bnn_zoo.check import check

    result = check(names[0], changes or [], seed)
    console = opt.console()
    console.print(result.table())
    console.print(result.verdict_line())
    if result.verdict == "wrong":
        raise typer.Exit(1)


def _check_by_simulation(
    names: Sequence[str], model: str, replicates: int, changes: list[str], jobs: int, seed: int, out: Path
) -> None:
    """Calibrate, print two tables, write figures and plots; end with code 1 where an exact method is not uniform."""
    from bnn_zoo.plot_sbc import sbc_plot
    from bnn_zoo.sbc import details, overview, run, save

    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a directory")
    notes = opt.console(stderr=True)

    def listen(name: str, done: int, total: int) -> None:
        if done == total or done % max(1, total // 5) == 0:
            notes.print(f"[{names.index(name) + 1}/{len(names)}] {name}: {done} of {total} replicates")

    torch.set_num_threads(1)
    with usage():
        rows = run(names, model, num_replicates=replicates, changes=changes, n_jobs=jobs, seed=seed, listen=listen)
    save(out, rows, seed)
    sbc_plot(out, rows)
    screen = opt.console()
    for table in (details(rows), overview(rows)):
        screen.print(table)
        screen.print()
    screen.print(
        "spread: mean squared distance of the ranks from their middle, 1 when calibrated, more when posteriors are too "
        "narrow"
    )
    screen.print(f"Plots, ranks and all figures: {out}")
    if any(row.verdict == "NOT UNIFORM" for row in rows):
        raise typer.Exit(1)
