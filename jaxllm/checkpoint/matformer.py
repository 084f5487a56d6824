"""MatFormer: a smaller model, cut out of a checkpoint as a line of a CSV file says.

mistral.rs reads the same files. The cut comes first: what is sharded, adapted or quantized is the smaller model. Rows
and columns are slices of the file, so nothing is read here; of packed matrices, complete blocks can be kept.
"""

import csv
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.opening import Checkpoint
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight, finest
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import HUGGING_FACE, MatFormer
from jaxllm.placing import taken

NAME, WIDTHS, SKIPPED = "name", "FFN Hidden Dims", "Layers Skipped"
COLUMNS = (NAME, "# Layers", "# Effective Params (B)", "MMLU PT accuracy", WIDTHS, SKIPPED)  # the others are not needed


def sliced(checkpoint: Checkpoint, file: str | os.PathLike, name: str) -> Checkpoint:
    """The slice `name` of a checkpoint, as the CSV `file` describes it.

    Raises:
        InputError: the family has no slices, the file has no such slice or cannot be read, the slice is not one of this
            model, or it would split blocks of a packed matrix.
    """
    family, file = checkpoint.family, Path(file)
    if family.matformer is None:
        takers = ", ".join(other.name for other in FAMILIES if other.matformer is not None)
        raise InputError(f"matformer '{name}' means nothing for models like {family.name}, only for {takers}")
    with located(file):
        widths, skipped = _read(file, name)
        count = len(checkpoint.config.layers)
        if beyond := [i for i in skipped if i >= count]:
            raise InputError(f"slice '{name}' skips layer {beyond[0]}, but the model has {count} layers")
        if not (kept := [i for i in range(count) if i not in skipped]):
            raise InputError(f"slice '{name}' skips all layers")
        if len(widths) != len(kept):
            raise InputError(f"slice '{name}': '{WIDTHS}' has {len(widths)} numbers for {len(kept)} layers")
        config = family.matformer.config(checkpoint.config, kept, widths)
    with located(checkpoint.name):
        tensors = _tensors(checkpoint, family.matformer, config, kept)
    dialect = family.dialects[checkpoint.dialect]
    said: Mapping[str, Any] = checkpoint.description  # of metadata, others use only what is the same for all slices
    if checkpoint.dialect == HUGGING_FACE:
        said = family.matformer.description(said, config)
    rules, ignored = dialect.rules(config, tensors), dialect.ignored(config)
    return replace(checkpoint, config=config, tensors=tensors, rules=rules, ignored=ignored, description=said)


def _tensors(checkpoint: Checkpoint, how: MatFormer, config: Any, kept: Sequence[int]) -> Mapping[str, Weight]:
    """The tensors of the layers that are kept, numbered anew, and cut."""
    made: dict[str, Weight] = {}
    for name, weight in checkpoint.tensors.items():
        hits = ((rule, re.fullmatch(rule.pattern, name)) for rule in checkpoint.rules)
        path, m = next(((m.expand(rule.target), m) for rule, m in hits if m), ("", None))
        new = name
        if m is not None and (layer := re.match(r"layers\.(\d+)\.", path)):
            if int(layer[1]) not in kept:
                continue
            new = f"{name[: m.start(1)]}{kept.index(int(layer[1]))}{name[m.end(1) :]}"
        made[new] = _cut(name, weight, *how.places(checkpoint.config, config, kept, path))
    return made


def _cut(name: str, weight: Weight, rows: np.ndarray | None, cols: np.ndarray | None) -> Weight:
    for dim, size, kept in zip(("out", "in"), weight.shape[-2:], (rows, cols), strict=False):
        if kept is None or len(kept) == size:
            continue
        what = "rows" if dim == "out" else "columns"
        if kept[-1] >= size:
            raise InputError(f"tensor '{name}' has {size} {what}, but the slice wants the {kept[-1] + 1}th of them")
        fine = finest(weight.unit(dim), size, 1, kept)
        if fine != weight.unit(dim):  # then scales may be repeated for the parts of a block
            weight = weight.refined(*(fine if each == dim else weight.unit(each) for each in ("out", "in")))
        try:
            weight = weight.arrange(rows if dim == "out" else None, cols if dim == "in" else None, taken)
        except InputError as error:
            raise InputError(
                f"tensor '{name}': {len(kept)} of its {size} {what} cannot be kept in {weight.format}: {error}"
            ) from error
    return weight


def _read(file: Path, name: str) -> tuple[list[int], list[int]]:
    """The widths of the feed-forward blocks, and the layers that are skipped."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            table = csv.DictReader(opened)
            columns, lines = table.fieldnames or (), list(table)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a CSV file: {str(error).splitlines()[0]}") from error
    missing = [column for column in (NAME, WIDTHS, SKIPPED) if column not in columns]
    if missing or (unknown := [column for column in columns if column not in COLUMNS]):
        what = f"no column '{missing[0]}'" if missing else f"an unknown column {reprlib.repr(unknown[0])}"
        raise InputError(f"{what}; the columns of such a file are {', '.join(COLUMNS)}")
    found = next((line for line in lines if line[NAME] == name), None)
    if found is None:
        raise InputError(f"no slice '{name}'; it has {', '.join(repr(line[NAME]) for line in lines) or 'none'}")
    return _numbers(found[WIDTHS], WIDTHS), _numbers(found[SKIPPED] or "[]", SKIPPED)


def _numbers(text: str | None, column: str) -> list[int]:
    """Whole numbers in a list such as `[2_048 * 4, 8192]`."""
    listed = re.fullmatch(r"\[([\d_*,\s]*)\]", (text or "").strip(), re.ASCII)
    try:
        entries = listed[1].split(",") if listed and listed[1].strip() else []
        numbers = [math.prod(map(int, entry.split("*"))) for entry in entries]
    except ValueError:
        listed = None
    if listed is None:
        raise InputError(f"'{column}' is {reprlib.repr(text)}, not a list such as [2_048 * 4, 8192]")
    return numbers
