"""The curvature that a fit took is kept for choosing the prior: the same answers, without passing the data again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inference import DenseLaplace, DiagonalLaplace, KroneckerLaplace, Subset, laplace_evidence, tune_prior
from inference.laplace import base
from tests.inference.laplace.test_tuning import _regression, linear

QUIET: dict[str, Any] = {"compile": False, "progress": False}
STRUCTURES = pytest.mark.parametrize("structure", [DenseLaplace, DiagonalLaplace, KroneckerLaplace])


@STRUCTURES
def test_tuning_takes_no_second_curvature_and_ends_where_one_would(
    structure: type[base.Laplace], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = _regression()
    posterior = structure(**QUIET).fit(linear(1.0), x, y)
    kept = tune_prior(posterior)
    again = structure(**QUIET).fit(linear(1.0), x, y)
    again.curvature = None
    anew = tune_prior(again)
    torch.testing.assert_close(kept.log_precision, anew.log_precision, rtol=1e-8, atol=1e-8)
    assert kept.log_evidence == pytest.approx(anew.log_evidence, abs=1e-9)

    def refused(*_: Any) -> None:
        raise AssertionError("the curvature was taken again")

    monkeypatch.setattr(structure, "likelihood_curvature", refused)
    assert tune_prior(posterior).log_evidence == kept.log_evidence
    assert float(laplace_evidence(kept.posterior)()) == pytest.approx(kept.log_evidence, abs=1e-9)


@STRUCTURES
def test_after_the_noise_was_chosen_the_old_curvature_is_gone(structure: type[base.Laplace]) -> None:
    x, y = _regression()
    tuned = tune_prior(structure(**QUIET).fit(linear(1.0), x, y), noise=True)
    assert tuned.posterior.curvature is None
    assert float(laplace_evidence(tuned.posterior)()) == pytest.approx(tuned.log_evidence, abs=1e-7)


def test_a_large_curvature_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _regression()
    assert DenseLaplace(**QUIET).fit(linear(1.0), x, y).curvature is not None
    monkeypatch.setattr(base, "_KEPT_BYTES", 4 * 4 * 8 - 1)
    assert DenseLaplace(**QUIET).fit(linear(1.0), x, y).curvature is None
    assert Subset(DenseLaplace(**QUIET), sites="w").fit(linear(1.0), x, y).curvature is None
