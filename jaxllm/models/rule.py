"""How a checkpoint's tensors become a model's parameters: each family lists rules for each kind of file.

The same rules, inverted, say which tensors a file has to hold for given parameters.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Scaled

Rows = Callable[[Any, re.Match], np.ndarray]
Present = Callable[[Weight, re.Match], Weight]


@dataclass(frozen=True)
class Rule:
    """Tensors whose full name matches `pattern` become the parameter `target` (a template for `re.Match.expand`).

    If the pattern has a group named `expert`, each tensor is one matrix of a stack. Several rules may match one tensor:
    it then becomes several parameters, each made of some of its rows.

    rows: given the model's config and the match, the tensor's row for each row of the parameter (None: in order).
    present: given a tensor and the match, the tensor as `[..., out, in]`, for tensors that are stored differently.
    """

    pattern: str
    target: str
    rows: Rows | None = None
    present: Present | None = None


def fixed(*rules: Rule) -> Callable[[Any, Mapping[str, Weight]], Sequence[Rule]]:
    """For `Dialect.rules`: rules that are the same for all models of a family."""
    return lambda config, tensors: rules


def transposed(weight: Weight, m: re.Match | None = None) -> Weight:
    """For `Rule.present`: a tensor stored as `[in, out]`. Packed tensors are always `[out, in]` and stay unchanged."""
    return weight.swapped() if isinstance(weight, Dense | Scaled) else weight


def column(weight: Weight, m: re.Match) -> Weight:
    """For `Rule.present`: a vector, or a stack of them, as a matrix of one column."""
    return Dense(weight.values.reshape(*weight.shape, 1)) if isinstance(weight, Dense) else weight


@dataclass(frozen=True)
class Written:
    """A tensor of a file that is to be written, and the parameters that it is made of.

    name: the tensor's name in the file.
    parts: the dotted path of each parameter, and which matrix of a stack (None: all of it). The rows of several parts
        are joined.
    turned: for each part, whether it is transposed before that; empty: none is.
    rows: row i of the tensor is row `rows[i]` of the joined parts (None: in order).
    stack: stored as a stack of this many matrices, each of as many rows; 0: as the parts are.
    shift: what the tensor's values are larger by than the parts'.
    transposed: stored as `[in, out]`.
    column: stored without the last axis, which is one column; see `column`.
    """

    name: str
    parts: tuple[tuple[str, int | None], ...]
    rows: np.ndarray | None
    transposed: bool = False
    column: bool = False
    turned: tuple[bool, ...] = ()
    stack: int = 0
    shift: float = 0.0

    def shape(self, parameters: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape in the file, from the shapes of all parameters."""
        shapes = [parameters[path] if i is None else parameters[path][1:] for path, i in self.parts]
        if self.turned:
            shapes = [shape[::-1] if turned else shape for shape, turned in zip(shapes, self.turned, strict=True)]
        *lead, _, cols = shapes[0] if len(shapes[0]) > 1 else (*shapes[0], 1)
        rows = sum(shape[-2:][0] for shape in shapes) if self.rows is None else len(self.rows)
        last = () if self.column or len(shapes[0]) == 1 else (cols,)
        if self.stack:
            lead, rows = [self.stack], rows // self.stack
        return (*lead, *last, rows) if self.transposed else (*lead, rows, *last)


# For each way of presenting a tensor: `Written.transposed` and `Written.column`.
_PRESENTED: dict[Present | None, tuple[bool, bool]] = {
    None: (False, False),
    transposed: (True, False),
    column: (False, True),
}

# Patterns of rules that can be inverted consist of escaped signs, plain text, and groups that are not nested.
_PIECE = re.compile(r"\\(\W)|\((\?:|\?P<\w+>)?([^()]+)\)|([\w-]+)")


def inverted(
    rules: Sequence[Rule],
    parameters: Mapping[str, tuple[int, ...]],
    config: Any,
    naming: Callable[[Rule, str], str | None] | None = None,
) -> list[Written]:
    """The tensors of a file that `rules` would read as these parameters. Of several rules, the first that fits counts.

    Args:
        parameters: the shape of each parameter by dotted path.
        config: a configuration as a file of this dialect would have it.
        naming: the name of the tensor that a rule reads as a parameter, or None, which says that the rule does not fit;
            by default `tensor_name`, for rules that can be inverted in full.

    Raises:
        InputError: lists the parameters that such a file has no tensors for.
    """
    made: dict[str, list[tuple[str, int | None, Rule]]] = {}
    complaints = []
    for path, shape in parameters.items():
        rule, name = next(((r, n) for r in rules if (n := (naming or _written_name)(r, path)) is not None), (None, ""))
        if rule is None:
            complaints.append(f"such files have no tensor for {path}")
        elif _EXPERT in name:
            for i in range(shape[0]):
                made.setdefault(name.replace(_EXPERT, str(i)), []).append((path, i, rule))
        else:
            made.setdefault(name, []).append((path, None, rule))
    written = []
    for name, parts in made.items():
        rows, first = None, parts[0][2]
        if len(parts) > 1 or first.rows is not None:
            joined = np.concatenate([_rows(rule, name, parameters[path], config) for path, _, rule in parts])
            rows = np.argsort(joined)
            if not np.array_equal(joined[rows], np.arange(len(rows))):
                complaints.append(f"tensor '{name}' is not made of {' and '.join(path for path, _, _ in parts)} alone")
            rows = None if np.array_equal(rows, np.arange(len(rows))) else rows
        presented = _PRESENTED.get(first.present, (False, False))
        written.append(Written(name, tuple((path, i) for path, i, _ in parts), rows, *presented))
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise InputError("; ".join(complaints[:8]) + more)
    return written


_EXPERT = "{expert}"  # stands for an expert's number in a name


def _written_name(rule: Rule, path: str) -> str | None:
    return tensor_name(rule, path) if rule.present in _PRESENTED else None


def tensor_name(rule: Rule, path: str) -> str | None:
    """The name of the tensor that `rule` reads as the parameter `path`; None if it reads none."""
    target, pieces = _inverse(rule.pattern, rule.target)
    if (m := target.fullmatch(path)) is None:
        return None
    return "".join(piece if isinstance(piece, str) else m[f"g{piece}"] for piece in pieces)


def _rows(rule: Rule, name: str, shape: tuple[int, ...], config: Any) -> np.ndarray:
    """The tensor's row for each row of a parameter of this shape."""
    m = re.fullmatch(rule.pattern, name)
    assert m is not None
    return np.arange(shape[-2:][0]) if rule.rows is None else rule.rows(config, m)


@cache
def _inverse(pattern: str, template: str) -> tuple[re.Pattern, list[str | int]]:
    """A pattern for the paths that `template` gives, and the tensor's name: texts, and numbers of groups in a path.

    Where several names would be read alike, it is the first alternative's.
    """
    pieces: list[str | int] = []
    groups: list[str] = []
    end = 0
    for m in _PIECE.finditer(pattern):
        assert m.start() == end, f"{pattern}: not understood from {pattern[end:]} on"
        end = m.end()
        sign, kind, content, text = m.groups()
        if content is None:
            pieces.append(sign or text)
        elif kind == "?:":
            pieces.append(content.split("|")[0])
        else:
            groups.append(content)
            used = rf"\{len(groups)}" in template
            pieces.append(len(groups) if used else _EXPERT if kind else content.split("|")[0])
    assert end == len(pattern), f"{pattern}: not understood from {pattern[end:]} on"
    texts = re.split(r"\\(\d)", template)
    texts[::2] = map(re.escape, texts[::2])
    texts[1::2] = [f"(?P<g{number}>{groups[int(number) - 1]})" for number in texts[1::2]]
    return re.compile("".join(texts)), pieces
