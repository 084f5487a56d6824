"""Tables as text, and as HTML for notebooks."""

from collections.abc import Sequence


def table(rows: Sequence[tuple], headers: Sequence[str], style: str = "simple") -> str:
    """A table whose cells are shown as they are; `style` is one of tabulate's, for example "html"."""
    from tabulate import tabulate  # slow to import, and answering a prompt needs no table

    return str(tabulate(rows, headers, tablefmt=style, disable_numparse=True))
