"""What an adapter's file does to a model's parameters: its names are read by the rules for the names of a checkpoint.

So an adapter fits every kind of base, whatever the names and the order of rows in the base's own file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint.adapter_files import AdapterFile
from jaxllm.checkpoint.matching import named, report, source_of, unused_rows
from jaxllm.declaration import Declaration
from jaxllm.errors import InputError, located
from jaxllm.formats.adapted import LowRank
from jaxllm.formats.dense import Dense
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import Dialect, Family
from jaxllm.models.rule import Rule
from jaxllm.placing import DerivedArray, Source
from jaxllm.requantize import floats, on_host

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to a model's parameters, in their own order of rows.

    changes: what it adds to matrices, or to stacks of them.
    replaced: the parameters that it trained as a whole.
    """

    name: str
    where: str
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, Source]


def changes_tied_ends(file: AdapterFile, config: Any) -> bool:
    """Whether an adapter changes the embedding table or the head of a model that has one table for both, and so needs a
    head of its own: an adapter's change concerns one end."""
    found, _ = named([*file.changes, *file.replaced], _rules(file, config)[1])
    return config.tie_word_embeddings and (EMBEDDING in found or HEAD in found)


def adapter(file: AdapterFile, config: Any, declared: Mapping[str, Declaration]) -> Adapter:
    """Match an adapter's tensors with a model's parameters.

    Args:
        config: the model's configuration.
        declared: the declaration of each of its parameters.

    Raises:
        InputError: the adapter is for another model; lists everything that does not fit.
    """
    adapted, rules = _rules(file, config)
    changes, complaints = _changes(file.changes, adapted, rules, declared, partial(_family(config).divided, config))
    shifts = _shifts(_family(config).dialects[file.dialect], adapted, declared) if file.replaced else {}
    whole = {name: values - shifts.get(name, 0) for name, values in file.replaced.items()}
    replaced, more = _replaced(whole, adapted, rules, declared)
    with located(file.where):
        report(complaints + more)
    return Adapter(file.name, file.where, changes, replaced)


def _family(config: Any) -> Family:
    return next(family for family in FAMILIES if isinstance(config, family.config))


def _rules(file: AdapterFile, config: Any) -> tuple[Any, Sequence[Rule]]:
    """The configuration as checkpoints with the adapter's names have it, and the rules for these names."""
    family = _family(config)
    if file.dialect not in family.dialects:
        raise InputError(
            f"{file.where}: has names of {file.dialect} files, which models like {family.name} do not have"
        )
    dialect = family.dialects[file.dialect]
    adapted = dialect.adapted(config)
    # A family's kinds may differ in the order of rows, which the shapes would not tell.
    kinds = [kind for kind in dialect.kinds if kind == getattr(adapted, "model_type", kind)] or dialect.kinds
    if file.kind and file.kind not in kinds:
        raise InputError(f"{file.where}: is for models of type {file.kind[:64]!r}, and this is {' or '.join(kinds)}")
    return adapted, dialect.rules(adapted, file.changes)


def _shifts(dialect: Dialect, adapted: Any, declared: Mapping[str, Declaration]) -> dict[str, float]:
    """What tensors in files of the adapter's kind are larger by than the parameters (Gemma's norms)."""
    if dialect.written is None:
        return {}
    shapes = {name: declaration.shape for name, declaration in declared.items()}
    return {written.name: written.shift for written in dialect.written(adapted, shapes) if written.shift}


def _changes(
    tensors: Mapping[str, LowRank],
    config: Any,
    rules: Sequence[Rule],
    declared: Mapping[str, Declaration],
    divided: Callable[[str, LowRank], Mapping[str, LowRank]],
) -> tuple[dict[str, LowRank], list[str]]:
    """What is added to each parameter; and complaints. An adapter need not change every matrix of a stack."""
    found, complaints = named(tensors, rules)
    changes: dict[str, LowRank] = {}
    sources = []
    for target, slots in found.items():
        first = next(iter(slots.values()))[0]
        if target not in declared:
            parts = divided(target, tensors[first])
            misfits = [
                _misfit(first, c.shape, declared[p].shape) for p, c in parts.items() if c.shape != declared[p].shape
            ]
            complaints += misfits if parts else [_no_place(first, target)]
            changes |= parts
            continue
        shape, numbers = declared[target].shape, [slot for slot in slots if slot is not None]
        source = source_of(config, tensors, list(slots.values()), bool(numbers))
        one = source.parts[0].shape
        differing = [slot for slot, part in zip(slots, source.parts, strict=True) if part.shape != one]
        if source.shape[bool(numbers) :] != shape[bool(numbers) :]:
            complaints.append(_misfit(first, source.shape[bool(numbers) :], shape[bool(numbers) :]))
        elif differing:
            complaints.append(f"'{slots[differing[0]][0]}' and '{first}' are for matrices of different shapes")
        elif numbers and max(numbers) >= shape[0]:
            complaints.append(f"'{slots[max(numbers)][0]}': the model has {shape[0]} experts")
        elif source.rows is None or source.rows.max() < one[-2]:  # else `unused_rows` complains
            changes[target] = _resolved(source, numbers, shape[0])
        sources.append(source)
    return changes, complaints + unused_rows(sources)


def _resolved(source: Source, numbers: Sequence[int], count: int) -> LowRank:
    """A parameter's change in one piece, from matrices of a stack with these numbers, if it is one, out of `count`."""
    parts = [part for part in source.parts if isinstance(part, LowRank)]
    rank = max(part.rank for part in parts)
    if numbers:
        by_number = dict(zip(numbers, (LowRank.joined([part], rank) for part in parts), strict=True))
        nothing = jax.tree.map(np.zeros_like, by_number[numbers[0]])
        whole = jax.tree.map(lambda *leaves: np.stack(leaves), *(by_number.get(i, nothing) for i in range(count)))
    else:
        whole = parts[0]
    return whole if source.rows is None else replace(whole, b=whole.b[..., source.rows, :])


def _replaced(
    tensors: Mapping[str, np.ndarray], config: Any, rules: Sequence[Rule], declared: Mapping[str, Declaration]
) -> tuple[dict[str, Source], list[str]]:
    """What takes the place of parameters; and complaints."""
    weights = {name: Dense(values) for name, values in tensors.items()}
    found, complaints = named(weights, rules)
    sources = {}
    for target, slots in found.items():
        first = next(iter(slots.values()))[0]
        if target not in declared:
            complaints.append(_no_place(first, target))
            continue
        order = sorted(slots, key=lambda number: number or 0)
        source = source_of(config, weights, [slots[i] for i in order], None not in slots)
        if source.shape != declared[target].shape:
            complaints.append(_misfit(first, source.shape, declared[target].shape))
        sources[target] = source
    return sources, complaints + unused_rows(sources.values())


def _no_place(name: str, target: str) -> str:
    return f"the model has no place for '{name}' ({target})"


def _misfit(name: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    return f"'{name}' is for a matrix of shape {[*shape]}, but the model's has {[*expected]}"


def merged(
    sources: Mapping[str, Source],
    adapters: Sequence[tuple[Adapter, float]],
    recoded: Callable[[str, Source], bool],
) -> dict[str, Source]:
    """The sources of a model's parameters with adapters, each times its scale, added to the matrices themselves.

    Args:
        recoded: whether a parameter is encoded anew afterwards, or held in another dtype. Then the sums are float32;
            otherwise they are rounded to the dtype of the file.

    Raises:
        InputError: a matrix would stay quantized.
    """
    result = dict(sources)
    for name in dict.fromkeys(name for read, _ in adapters for name in read.changes):
        source, dtype = sources[name], np.dtype(np.float32)
        stored = source.parts[0]
        if not recoded(name, source):
            if not isinstance(stored, Dense):
                raise InputError(
                    f"{name} is {stored.format}: to merge with it, name a type that it is encoded in afterwards "
                    "(quantize), or leave the adapter beside it"
                )
            dtype = np.dtype(stored.values.dtype)
        parts = [(read.changes[name], scale) for read, scale in adapters if name in read.changes]
        result[name] = _sum(source, parts, dtype)
    return result


def _sum(source: Source, changes: Sequence[tuple[LowRank, float]], dtype: np.dtype) -> Source:
    """A parameter plus changes with factors: computed when it is read, matrix by matrix, in the checkpoint's order."""
    *lead, rows, cols = source.shape

    def compute(number: int) -> np.ndarray:
        total = floats(source, number)
        with on_host():
            for change, scale in changes:
                total = total + scale * floats(Source("", (change,)), number)
        return np.asarray(total).astype(dtype)

    made = [Dense(DerivedArray((rows, cols), dtype, partial(compute, i))) for i in range(math.prod(lead))]
    return Source(source.name, tuple(made), stacked=bool(lead))
