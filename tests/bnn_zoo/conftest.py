"""Tests that need the whole data cache are collected only where `BNN_ZOO_DATA` says where it is."""

import os

import pytest

collect_ignore = [] if os.environ.get("BNN_ZOO_DATA") else ["test_data_cache.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in collect_ignore:
        terminalreporter.write_line(f"not collected: tests/bnn_zoo/{name} (BNN_ZOO_DATA is not set)")
