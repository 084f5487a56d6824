"""Which tensors of a checkpoint become which parameters of a model, by its rules, before anything is read."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, shards
from jaxllm.formats.dense import Dense
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.models.rule import Rule
from jaxllm.placing import Source


def match(
    model: Decoder, tensors: Mapping[str, Weight], rules: Sequence[Rule], ignored: Sequence[str] = ()
) -> dict[str, Source]:
    """For each parameter of the model, its source in the checkpoint.

    Args:
        tensors: the checkpoint's tensors by name.
        ignored: patterns of tensor names that such checkpoints may have and we do not need.

    Raises:
        InputError: lists every tensor that is unknown, missing, duplicate or has the wrong shape.
    """
    found, complaints = named([n for n in tensors if not any(re.fullmatch(p, n) for p in ignored)], rules)
    declared = parameters(model)
    sources = {}
    for target, param in declared.items():
        if target not in found:
            complaints.append(f"missing tensor for {target}")
            continue
        slots, shape = found.pop(target), param.get_value().shape
        experts = sorted(slot for slot in slots if slot is not None)
        stacked = len(experts) == len(slots)
        if stacked and experts != list(range(shape[0])):
            complaints.append(f"{target} needs experts 0 to {shape[0] - 1}, found {_listed(experts)}")
            continue
        ordered = [slots[i] for i in sorted(slots, key=lambda i: i or 0)]
        source = source_of(model.config, tensors, ordered, stacked)
        if source.shape != shape:
            complaints.append(f"tensor '{source.name}' has shape {list(source.shape)}, expected {list(shape)}")
        for part in source.parts:
            if isinstance(part, Dense) and not jax.dtypes.issubdtype(part.values.dtype, np.floating):
                complaints.append(f"tensor '{source.name}' is of {part.format}, not of floating-point numbers")
        sources[target] = source
    for target, slots in found.items():
        complaints += [f"tensor '{name}' has no place ({target})" for name, _, _ in slots.values()]
    report(complaints + unused_rows(sources.values()))
    return sources


# For each parameter, the tensors that stand for it: by the number of its matrix (None: all of it) the tensor's name,
# the rule, and its match.
Found = dict[str, dict[int | None, tuple[str, Rule, re.Match]]]


def named(names: Iterable[str], rules: Sequence[Rule]) -> tuple[Found, list[str]]:
    """Which parameters tensors stand for, by their names; and complaints about the others."""
    found: Found = {}
    complaints = []
    for name in names:
        hits = [(rule, m) for rule in rules if (m := re.fullmatch(rule.pattern, name))]
        if not hits:
            complaints.append(f"unknown tensor '{name}'")
        for rule, m in hits:
            target, expert = m.expand(rule.target), m.groupdict().get("expert")
            slots = found.setdefault(target, {})
            slot = None if expert is None else int(expert)
            if slot in slots:
                complaints.append(f"tensors '{slots[slot][0]}' and '{name}' both stand for {target}")
            slots[slot] = name, rule, m
    return found, complaints


def report(complaints: Sequence[str]) -> None:
    """Raise InputError for complaints, if there are any."""
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise InputError("; ".join(complaints[:8]) + more)


def source_of(
    config: object,
    tensors: Mapping[str, Weight],
    found: list[tuple[str, Rule, re.Match]],
    stacked: bool,
) -> Source:
    """Where the parameter comes from that these tensors stand for; if `stacked`, each is one matrix of it."""
    name, rule, m = found[0]
    parts = [rule.present(tensors[name], m) if rule.present else tensors[name] for name, rule, m in found]
    scalar = parts[0].shape == ()  # has no rows, and will be refused
    return Source(name, tuple(parts), stacked, None if rule.rows is None or scalar else rule.rows(config, m))


def unused_rows(sources: Iterable[Source]) -> list[str]:
    """A complaint for each tensor whose rows are not all used exactly once by the parameters made of them."""
    have: dict[str, int] = {}
    want: Counter[str] = Counter()
    for source in sources:
        if source.rows is not None:
            have[source.name] = source.parts[0].shape[-2:][0]
            want[source.name] += len(source.rows)
    return [f"tensor '{name}' has {n} rows, expected {want[name]}" for name, n in have.items() if n != want[name]]


def _listed(numbers: list) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def row_block(
    declared: Mapping[str, nnx.Param],
    sources: Mapping[str, Source],
    planned: Callable[[str, Source], Weight],
    mesh: Mesh,
) -> int:
    """The largest block size along columns, after encoding, of the matrices whose columns the model splits."""
    cut = [
        planned(name, sources[name]).granularity("in")
        for name, param in declared.items()
        if len(spec := param.get_value().spec) >= 2 and shards(spec[-1], mesh) > 1
    ]
    return max(cut, default=1)
