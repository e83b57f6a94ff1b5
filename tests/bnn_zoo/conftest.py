"""Tests that need the data cache or a browser are collected only where there is one; the run says which are not."""

import os
import shutil

import pytest

from tests.bnn_zoo.tiny import BROWSERS

_MISSING = {}
if not os.environ.get("BNN_ZOO_DATA"):
    _MISSING["test_data_cache.py"] = "BNN_ZOO_DATA is not set"
if not (any(map(shutil.which, BROWSERS)) and shutil.which("chromedriver")):
    _MISSING["test_browser.py"] = "chromium and chromedriver were not both found"
collect_ignore = list(_MISSING)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in _MISSING.items():
        terminalreporter.write_line(f"not collected: tests/bnn_zoo/{name} ({reason})")
