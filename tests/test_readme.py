"""What the README claims in tables is what the code does; the long version is tests/reference/format_table.py."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "reference"))
import format_table as table  # noqa: E402

README = (ROOT / "README.md").read_text()


def rows_of(heading):
    """The cells of the table under a heading, by the first one of each row."""
    section = README.split(f"### {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return head, {name: cells for name, *cells in body}


HEAD, ROWS = rows_of("Prequantized checkpoints")


def test_the_table_of_formats_has_every_format_and_every_operation():
    assert ["format", *table.COLUMNS, "encode"] == HEAD
    assert list(ROWS) == list(table.ROWS)


@pytest.mark.parametrize("title", table.ROWS)
def test_a_row_of_the_table_of_formats(title):
    """Every format is read, multiplied and looked up: test_quantized_layers and test_ggml_formats fail if not. Which
    ones can be encoded is looked at here, for the first of each row."""
    assert set(ROWS[title][:-1]) == {"yes"}
    assert ROWS[title][-1] == table.cell(table.encodes(table.ROWS[title][0]), 1)
