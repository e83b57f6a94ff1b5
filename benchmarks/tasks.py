"""The tasks by name: what each one is about, and where its cases come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import diagnostics, ensemble, laplace, leapfrog, mean_field, predictive
from benchmarks.measure import Case, NotRun, Settings


@dataclass(frozen=True)
class Task:
    """A group of cases that goes into one file.

    Attributes:
        name: Its name on the command line and of its file.
        title: Heading in the report.
        cases: Sets up the cases, one after another.
    """

    name: str
    title: str
    cases: Callable[[Settings], Iterator[Case | NotRun]]


TASKS = {
    task.name: task
    for task in (
        Task("leapfrog", "One leapfrog of Hamiltonian Monte Carlo", leapfrog.cases),
        Task("ensemble", "A deep ensemble", ensemble.cases),
        Task("predictive", "Posterior predictive", predictive.cases),
        Task("diagnostics", "Convergence diagnostics", diagnostics.cases),
        Task("mean_field", "A step of mean-field variational inference", mean_field.cases),
        Task("laplace", "Laplace approximations of trained networks", laplace.cases),
    )
}
