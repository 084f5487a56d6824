"""What the README and the pages claim is what the code does; the long version is tests/reference/format_table.py."""

import re
import subprocess
import sys
from pathlib import Path

import covering
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "reference"))
import format_table as table  # noqa: E402

PAGE = (ROOT / "docs" / "formats.md").read_text()


def rows_of(page):
    """The cells of a page's first table, by the first one of each row."""
    lines = re.search(r"(?:^\|.*\n)+", page, re.MULTILINE)[0].splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return head, {name: cells for name, *cells in body}


HEAD, ROWS = rows_of(PAGE)


def test_the_table_of_formats_has_every_format_and_every_operation():
    assert ["format", *table.COLUMNS, "encode"] == HEAD
    assert list(ROWS) == list(table.ROWS)


@pytest.mark.parametrize("title", table.ROWS)
def test_a_row_of_the_table_of_formats(title):
    """Every format is read, multiplied and looked up: test_quantized_layers and test_ggml_formats fail if not. Which
    ones can be encoded is looked at here, for the first of each row; with --full, all that the row says."""
    if covering.FULL:
        assert ROWS[title] == table.row(table.ROWS[title])
    *linear, experts, encode = ROWS[title]
    assert (set(linear), experts) == ({"1, 2, 4, 8"}, "1, 2, 6, 8")
    assert encode == table.encoded(table.ROWS[title][:1])


@pytest.mark.skipif(not covering.FULL, reason="with --full")
def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout and "(1, 3, 49152)" in done.stdout
