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


def in_turn(names: Iterable, *meshes: object) -> list[tuple]:
    """Every name on one of the meshes, which take turns."""
    names = list(names)
    if FULL:
        return list(itertools.product(names, meshes))
    return [(name, meshes[i % len(meshes)]) for i, name in enumerate(names)]


def widest_and_in_turn(names: Iterable, *meshes: object) -> list[tuple]:
    """Every name on the last of the meshes, the widest, and on one of the others, which take turns."""
    names = list(names)
    rows = [*in_turn(names, *meshes[:-1]), *((name, meshes[-1]) for name in names)]
    return sorted(rows, key=lambda row: names.index(row[0]))


def some(values: Sequence, few: Sequence) -> Sequence:
    """All values, or, where not everything is asked for, a few that stand for them."""
    return values if FULL else few
