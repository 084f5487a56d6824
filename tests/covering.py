"""Case tables that cover without being full products, which `pytest --full` (`make test-all`) asks for."""

import itertools
from collections.abc import Iterable, Sequence

FULL = False  # set by conftest before tests are collected


def covering(*columns: Iterable) -> list[tuple]:
    """Rows in which every pair of values from any two columns occurs; greedy, so nearly as few as there can be."""
    columns = [list(column) for column in columns]
    rows = list(itertools.product(*columns))
    if FULL:
        return rows
    wanted = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while wanted:
        best = max(rows, key=lambda row: sum(pair in wanted for pair in _pairs(row)))
        wanted.difference_update(_pairs(best))
        chosen.append(best)
    return sorted(chosen, key=rows.index)


def _pairs(row: tuple) -> list[tuple]:
    return list(itertools.combinations(enumerate(row), 2))


def in_turn(names: Iterable, *meshes: str) -> list[tuple]:
    """Every name on the last of `meshes`, the widest, and on one of the others in turn."""
    names, others = list(names), meshes[:-1]
    if FULL:
        return [(name, mesh) for name in names for mesh in meshes]
    return [(name, mesh) for i, name in enumerate(names) for mesh in (others[i % len(others)], meshes[-1])]


def some(values: Sequence, few: Sequence) -> Sequence:
    """All values, or, where not everything is asked for, a few that stand for them."""
    return values if FULL else few
