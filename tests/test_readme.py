"""The README says what the code does: its backend table is the generated one, its pictures exist."""

import re
from pathlib import Path

from inference.registry import BACKENDS, backend_table

README = Path(__file__).parent.parent / "README.md"


def test_backend_table_is_the_generated_one() -> None:
    text = README.read_text()
    found = re.search(r"<!-- backends:.*?-->\n(.*?)<!-- /backends -->", text, re.DOTALL)
    assert found is not None
    assert found.group(1).strip() == backend_table()


def test_table_has_a_row_with_the_bias_of_every_backend() -> None:
    rows = backend_table().splitlines()
    assert len(rows) == len(BACKENDS) + 2
    for entry, row in zip(BACKENDS.values(), rows[2:], strict=True):
        assert entry.bias in row
        assert f"`{entry.cls.__name__}`" in row


def test_local_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert len(links) > 5
    missing = [link for link in links if not (README.parent / link).exists()]
    assert not missing
