"""The page: self-contained, escaped, with a picture in both modes for every plot, and warnings that fit the figures."""

import copy
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bnn_zoo.compare import compare
from bnn_zoo.data import load
from bnn_zoo.findings import findings
from bnn_zoo.report import write_report
from bnn_zoo.tasks import DataSpec
from inference import MAP
from tests.bnn_zoo.tiny import comparison

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    out = tmp_path_factory.mktemp("runs") / "sine"
    results = compare(comparison(out, backends="map,nuts"))
    return out, results, Page(write_report(out, results, load("sine")).read_text())


def test_page_asks_nothing_of_the_network_or_the_disk(made: tuple[Path, dict[str, Any], Page]) -> None:
    page = made[2]
    urls = [a[key] for _, a in page.tags for key in ("src", "srcset", "href", "action") if key in a]
    assert urls
    assert all(str(url).startswith(("data:", "#")) for url in urls)
    styles = (made[0] / "report.html").read_text().split("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles


def test_every_plot_has_a_dark_twin_an_alt_text_and_its_size(made: tuple[Path, dict[str, Any], Page]) -> None:
    out, _, page = made
    images = page.all("img")
    assert len(images) == len(page.all("source")) == len(list((out / "plots").glob("*.svg")))
    for image in images:
        assert len(image["alt"] or "") > 30
        assert int(image["width"] or 0) > 0
    assert {s["media"] for s in page.all("source")} == {"(prefers-color-scheme: dark)"}


def test_dark_plots_are_dark_and_light_ones_light(made: tuple[Path, dict[str, Any], Page]) -> None:
    for file in (made[0] / "plots").glob("*.png"):
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            brightness = np.asarray(image.convert("L"), dtype=float)
        assert (brightness.mean() < 100) == file.stem.endswith("-dark"), file.name
        assert brightness.std() > 5  # something is drawn


def test_all_figures_of_the_terminal_are_on_the_page(made: tuple[Path, dict[str, Any], Page]) -> None:
    _, results, page = made
    for row in results["rows"]:
        assert f"{row['scores']['nll']:,.3f}" in page.text
        assert f"{100 * row['scores']['coverage_90']:.1f} %" in page.text
    assert "noise floor" in page.text


def test_names_of_the_users_columns_are_escaped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    target = "<script>alert(1)</script>"
    pd.DataFrame({"a": rng.normal(size=40), target: rng.normal(size=40)}).to_csv(tmp_path / "x.csv", index=False)
    spec = DataSpec(csv=tmp_path / "x.csv", target=target)
    what = comparison(tmp_path / "out", backends="map", data="")
    what = type(what)(**{**what.__dict__, "data": spec})
    page = Page(write_report(what.out, compare(what), spec.load()).read_text())
    assert target in page.text
    assert len(page.all("script")) == 1


def test_failed_backend_is_named_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MAP, target: Any, run: Any) -> None:
        raise RuntimeError("a <b>bold</b> failure")

    monkeypatch.setattr(MAP, "fit_target", fail)
    results = compare(comparison(tmp_path / "out", backends="map"))
    page = Page(write_report(tmp_path / "out", results, load("sine")).read_text())
    assert "RuntimeError: a <b>bold</b> failure" in page.text
    assert "No backend finished" in page.text


def test_chains_that_disagree_are_the_first_thing_said(made: tuple[Path, dict[str, Any], Page]) -> None:
    results = copy.deepcopy(made[1])
    figures = results["rows"][1]["diagnosis"]
    figures["rhat_functions_above_1.1"], figures["rhat_functions_95"] = 0.06, 1.3
    first = findings(results)[0]
    assert first.kind == "warning"
    assert "chains of the reference nuts disagree" in first.text
    figures["rhat_functions_above_1.1"], figures["rhat_functions_95"] = 0.05, 1.09
    first = findings(results)[0]
    assert first.kind == "answer"
    assert "agree" in first.text


def test_intervals_that_miss_too_often_and_large_khat_are_warned_of(made: tuple[Path, dict[str, Any], Page]) -> None:
    results = copy.deepcopy(made[1])
    row = results["rows"][0]
    results["data"]["num_test"] = 100  # two standard errors of a coverage of 90 % are 6 %
    row["scores"]["coverage_90"], row["diagnosis"]["khat"] = 0.83, "inf"
    results["rows"][1]["scores"]["coverage_90"] = 0.85
    texts = [finding.text for finding in findings(results) if finding.kind == "warning"]
    assert any("Too sure" in text and "map (83%)" in text and "nuts" not in text for text in texts)
    assert any("k-hat is above 0.7 for map" in text for text in texts)


def test_infinite_nll_does_not_break_the_page(made: tuple[Path, dict[str, Any], Page], tmp_path: Path) -> None:
    results = copy.deepcopy(made[1])
    results["rows"][0]["scores"]["nll"] = "inf"
    text = write_report(made[0], results, load("sine")).read_text()
    assert "<td>inf</td>" in text
    assert findings(results)[-1].text
