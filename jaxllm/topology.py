"""Topology files: YAML that chooses quantization types for layers and matrices, as mistral.rs has them.

    0-8:                   # layers 0 to 7
      isq: q3_k
    8:                     # one layer
      isq: q8_0
    '/attn\\.q_proj/':     # every matrix with such a name
      isq: q6_k

Patterns come before layers, and the last of several patterns that match is used. Of several ranges, the one that ends
later is used, or else the one that was declared later. An entry without `isq` leaves its matrices to the general type.

Source: `Topology::immediate_overrides` in mistral.rs's `mistralrs-core/src/topology/mod.rs`.
"""

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

from jaxllm.encodings import Encoding, encoding
from jaxllm.errors import InputError, located
from jaxllm.patterns import occurs

_RANGE = re.compile(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Topology:
    """Types for matrices by their names. `patterns` and `ranges` are in order of precedence, with the text of each."""

    patterns: tuple[tuple[str, str, Encoding | None], ...]
    ranges: tuple[tuple[str, range, Encoding | None], ...]

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The topology in the file `path`. Raises InputError if there is none, or it makes no sense."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"topology {path}: {error}") from error
        with located(path):
            return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The topology in a text. Raises InputError if it is not YAML, or makes no sense."""
        try:
            given = yaml.load(text, yaml.BaseLoader)  # leaves all as text: dates and numbers fail in many ways
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"topology: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise InputError("topology: expected entries such as '0-8: {isq: q4_k}'")
        patterns, ranges = [], []
        for selector, value in given.items():
            type = _type(selector, value)
            if len(selector) > 1 and selector[0] == selector[-1] == "/":
                with located("topology"):
                    occurs(pattern := selector[1:-1], "")
                patterns.append((selector, pattern, type))
                continue
            if not (found := _RANGE.fullmatch(selector)):
                raise InputError(f"topology: '{selector}' is no layer, no range such as 0-8, and no /pattern/")
            layers = range(int(found[1]), int(found[2] or int(found[1]) + 1))
            if not layers:
                raise InputError(f"topology: the range '{selector}' has no layers; its end is not included")
            ranges.append((selector, layers, type))
        latest = sorted(enumerate(ranges), key=lambda pair: (pair[1][1].stop, pair[0]), reverse=True)
        return cls(tuple(reversed(patterns)), tuple(entry for _, entry in latest))

    def find(self, names: Iterable[str]) -> tuple[str, Encoding | None] | None:
        """The entry for a matrix that has these names, and its type (None: the general one); None: no entry."""
        names = list(names)
        for text, pattern, type in self.patterns:
            if any(occurs(pattern, name) for name in names):
                return text, type
        layer = next((int(m[1]) for name in names if (m := _LAYER.search(name))), None)
        return next(((text, type) for text, layers, type in self.ranges if layer in layers), None)


def _type(key: object, value: object) -> Encoding | None:
    if value == "":
        return None
    if not isinstance(value, dict) or not value.keys() <= {"isq", "device"}:
        raise InputError(f"topology: entry '{key}' is not of the form {{isq: q4_k}}")
    if "device" in value:
        warnings.warn(f"topology: 'device' of '{key}' is left out: the mesh places all layers", stacklevel=2)
    if not isinstance(type := value.get("isq", ""), str):  # a list of lists of lists could be too long for a message
        raise InputError(f"topology: 'isq' of entry '{key}' is not the name of a type")
    return encoding(type) if type else None
