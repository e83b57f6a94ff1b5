"""The report in a real browser: no errors, every picture loads, and it fits a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from bnn_zoo.compare import compare
from bnn_zoo.report import write_report
from bnn_zoo.tasks import DataSpec
from tests.bnn_zoo.tiny import BROWSERS, comparison

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::UserWarning")]

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
_IMAGES = "return Array.from(document.images, i => [i.complete, i.naturalWidth, i.currentSrc.length])"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in _FLAGS:
        options.add_argument(flag)
    options.binary_location = next(path for name in BROWSERS if (path := shutil.which(name)))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["sine", "moons"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / request.param
    results = compare(comparison(out, data=request.param, backends="map,nuts"))
    return write_report(out, results, DataSpec(name=request.param).load())


def visit(browser: webdriver.Chrome, report: Path, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 2, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    browser.get(report.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_page_loads_without_errors_and_fits_the_window(
    browser: webdriver.Chrome, report: Path, width: int, scheme: str
) -> None:
    visit(browser, report, width, scheme)
    assert browser.get_log("browser") == []
    images = browser.execute_script(_IMAGES)
    assert len(images) >= 6
    assert all(complete and natural > 0 for complete, natural, _ in images)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_dark_mode_changes_background_text_and_pictures(browser: webdriver.Chrome, report: Path) -> None:
    script = (
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color, document.images[0].currentSrc]"
    )
    seen = []
    for scheme in ("light", "dark"):
        visit(browser, report, 800, scheme)
        seen.append(browser.execute_script(script))
    assert all(light != dark for light, dark in zip(*seen, strict=True))


def test_button_copies_a_table_as_tab_separated_values(browser: webdriver.Chrome, report: Path) -> None:
    visit(browser, report, 1200, "light")
    # What would reach the clipboard is caught on its way: a headless browser has none that could be read.
    browser.execute_script(
        "window.copied = null;"
        "const fake = {writeText: t => { window.copied = t; return Promise.resolve(); }};"
        "Object.defineProperty(navigator, 'clipboard', {value: fake});"
        "Object.defineProperty(window, 'isSecureContext', {value: true});"
        "document.querySelector('button[data-copy=table-prediction]').click();"
    )
    lines = browser.execute_script("return window.copied").split("\n")
    heads = [line.split("\t") for line in lines]
    assert heads[0][0] == "backend"
    assert [cells[0] for cells in heads[1:]] == ["map", "nuts (ref.)"]
    assert len({len(cells) for cells in heads}) == 1
