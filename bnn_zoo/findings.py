"""What a comparison shows, in sentences with their numbers, and what there is to worry about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bnn_zoo.columns import number, written

_RHAT_LIMIT, _RHAT_SHARE, _KHAT_LIMIT = 1.1, 0.05, 0.7


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        kind: "answer", or "warning" for what makes answers doubtful.
        text: The sentence.
    """

    kind: Literal["answer", "warning"]
    text: str


def findings(results: dict[str, Any]) -> list[Finding]:
    """The sentences at the head of a report: warnings about the reference first.

    Args:
        results: Content of ``results.json``.

    Returns:
        Findings.
    """
    done = [row for row in results["rows"] if row["status"] == "done"]
    if not done:
        return [_warning("No backend finished; see the errors below.")]
    return [*_reference(results, done), *_answers(results, done)]


def _reference(results: dict[str, Any], done: list[dict[str, Any]]) -> list[Finding]:
    name = results["settings"]["reference"]
    row = next((row for row in done if row["backend"] == name), None)
    if name is None:
        return [_warning("No reference was run: nothing here says how far a prediction is from the posterior's.")]
    if row is None:
        return [_warning(f"The reference {name} failed: there are no distances.")]
    figures = row["diagnosis"]
    share, worst = figures["rhat_functions_above_1.1"], figures["rhat_functions_95"]
    if share is None or worst is None:
        found = [_warning(f"The reference {name} has no chains to compare: nothing says that it is right.")]
    elif share > _RHAT_SHARE:
        text = (
            f"The chains of the reference {name} disagree: R-hat of the predictions is above {_RHAT_LIMIT} at "
            f"{share:.0%} of the test inputs (95 % quantile {number(worst):.2f}; see the traces). It is not the exact "
            "posterior yet: differences near its noise floor mean nothing. Run longer, with a larger --budget."
        )
        found = [_warning(text)]
    else:
        text = f"The chains of the reference {name} agree: R-hat of the predictions is at most {number(worst):.3f} at"
        found = [_answer(f"{text} 95 % of the test inputs.")]
    if figures["divergences"]:
        text = f"{figures['divergences']} draws of the reference {name} diverged: it may miss a part of the posterior."
        found.append(_warning(text))
    return [*found, *_floor(results, done)]


def _floor(results: dict[str, Any], done: list[dict[str, Any]]) -> list[Finding]:
    name, floor, key = results["settings"]["reference"], results["noise_floor"], _distance_key(results)
    if not floor or key not in floor:
        return []
    near = [row["backend"] for row in done if row.get("distance") and row["distance"][key] <= 1.5 * floor[key]]
    end = f"as close to it, within a factor of 1.5: {', '.join(near)}" if near else "no other backend comes that close"
    return [
        _answer(f"{name}'s own noise floor is {written(floor[key], '3g')}, between the halves of its chains; {end}.")
    ]


def _answers(results: dict[str, Any], done: list[dict[str, Any]]) -> list[Finding]:
    ranked = sorted(done, key=lambda row: number(row["scores"]["nll"]))
    scores = ranked[0]["scores"]
    text = f"Best test NLL: {ranked[0]['backend']}, {written(scores['nll'], '3f')} nats per datum"
    if scores["nll_stderr"]:
        text += f" (standard error {written(scores['nll_stderr'], '3f')} over the test data)"
    if len(ranked) > 1:
        text += f"; then {ranked[1]['backend']}, {written(ranked[1]['scores']['nll'], '3f')}"
    found = [_answer(f"{text}.")]
    key = _distance_key(results)
    near = sorted((row for row in done if row.get("distance")), key=lambda row: row["distance"][key])
    if near:
        text = f"Nearest to the reference: {near[0]['backend']} ({written(near[0]['distance'][key], '3g')})"
        cheap = next((row for row in near if row["cost"]["seconds"] < 0.2 * near[0]["cost"]["seconds"]), None)
        if cheap:
            text += f"; in a fifth of its time or less: {cheap['backend']} ({written(cheap['distance'][key], '3g')})"
        found.append(_answer(f"{text}."))
    return [*found, *_doubts(results, done)]


def _doubts(results: dict[str, Any], done: list[dict[str, Any]]) -> list[Finding]:
    found = []
    if results["data"]["task"] == "regression":
        low = _low(results)
        sure = [(row["backend"], row["scores"]["coverage_90"]) for row in done if row["scores"]["coverage_90"] < low]
        if sure:
            names = ", ".join(f"{name} ({share:.0%})" for name, share in sure)
            found.append(_warning(f"Too sure: 90 % intervals that hold clearly fewer test targets: {names}."))
    off = [row["backend"] for row in done if number(row["diagnosis"]["khat"], float("-inf")) > _KHAT_LIMIT]
    if off:
        text = f"k-hat is above {_KHAT_LIMIT} for {', '.join(off)}: their Gaussians are not the posterior, whatever"
        found.append(_warning(f"{text} their predictions are."))
    return found


def _distance_key(results: dict[str, Any]) -> str:
    return "wasserstein1" if results["data"]["task"] == "regression" else "total_variation"


def _low(results: dict[str, Any]) -> float:
    """Two standard errors below 90 % coverage at this number of test data."""
    return 0.9 - 2 * (0.9 * 0.1 / results["data"]["num_test"]) ** 0.5


def _answer(text: str) -> Finding:
    return Finding("answer", text)


def _warning(text: str) -> Finding:
    return Finding("warning", text)
