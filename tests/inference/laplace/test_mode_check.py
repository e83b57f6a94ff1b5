"""A mode that is taken as given is checked in the passes of the curvature: the same figures as by passes of its own."""

from __future__ import annotations

from typing import Any

import pytest

from inference import DenseLaplace, DiagonalLaplace, KroneckerLaplace
from inference.errors import ApproximationWarning
from inference.laplace import base
from tests.networks import network

ALONE: dict[str, Any] = {"start": None, "polish_steps": 0, "progress": False, "compile": False}


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("name", ["by_hand", "lenet", "learnt_noise"])
@pytest.mark.parametrize("structure", [DenseLaplace, DiagonalLaplace, KroneckerLaplace])
def test_the_check_of_a_given_mode_needs_no_pass_of_its_own(
    structure: type[base.Laplace], name: str, temperatures: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, theta = network(name)
    backend = structure(**ALONE, temperature=temperatures[0], likelihood_temperature=temperatures[1])

    def figures() -> dict[str, float]:
        with pytest.warns(ApproximationWarning):
            found = backend.fit_to(target, init=theta)
        held = {key: value for key, value in found.info.extra.items() if isinstance(value, float)}
        evidence = found.log_evidence if temperatures == (1.0, 1.0) else 0.0
        return held | {"evidence": evidence, "gradients": found.info.gradients}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "collected", lambda *_: None)
        expected = figures()

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the data were passed again")

    monkeypatch.setattr(base, "energy_of", lambda *_, **__: refused)
    found = figures()
    assert "newton_decrement" in " ".join(found)
    assert found == pytest.approx(expected, rel=1e-8)
