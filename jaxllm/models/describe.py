"""A model's description for files of another kind, read back before it is believed."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.models.family import GGUF, Dialect, Family
from jaxllm.models.rope_describing import gguf_rope_tensors
from jaxllm.models.rule import Written, inverted

_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # or transformers takes some of its own
_ROUNDING = 1e-6  # GGUF's numbers are float32


@dataclass(frozen=True)
class Described:
    """What a file of another dialect says of a model, besides its weights.

    entries: a config.json, or GGUF metadata; without what concerns quantization and names. Special tokens are null in
        a config.json, and not in metadata.
    config: the configuration that is read from them.
    written: the tensors that hold the model's parameters.
    tensors: what the file has as tensors though it is no parameter: rotary factors, by name.
    """

    entries: dict[str, Any]
    config: Any
    written: list[Written]
    tensors: dict[str, np.ndarray]


def described(
    family: Family,
    source: str,
    target: str,
    description: Mapping[str, object],
    tensors: Mapping[str, Weight],
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
) -> Described:
    """A model from a file of the dialect `source`, as a file of the dialect `target` describes it.

    Args:
        description, tensors: the source's own.
        config: the model's configuration.
        shapes: its parameters' shapes by dotted path.

    Raises:
        InputError: such a file cannot describe this model.
    """
    ours, theirs = family.dialects[source], family.dialects[target]
    if ours.rotary is None or theirs.describes is None:
        raise InputError(f"models like {family.name} cannot be written from {source} files as {target} files")
    settings = ours.rotary(description, tensors)
    adapted = theirs.adapted(config)
    entries = theirs.describes(adapted, settings)
    written = tensors_of(theirs, config, shapes)
    more: dict[str, np.ndarray] = {}
    stubs: dict[str, Weight] = {}  # a config.json has to say everything itself
    if target == GGUF:  # such files say much by their tensors
        more = gguf_rope_tensors(settings, config.rope)
        stubs = {w.name: Dense(jax.ShapeDtypeStruct(w.shape(shapes), np.float32)) for w in written}
        stubs |= {name: Dense(values) for name, values in more.items()}
    else:
        entries = _shortest(entries) | _NO_TOKENS
    again = theirs.config(entries, stubs)
    if unlike := list(_unlike(again, adapted)):
        raise InputError(f"{target} files cannot say of such a model: {', '.join(unlike[:4])}")
    return Described(entries, again, written, more)


def tensors_of(dialect: Dialect, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors by which files of a dialect hold a model's parameters.

    Args:
        config: the model's configuration, from any kind of file.
        shapes: its parameters' shapes by dotted path.

    Raises:
        InputError: there are parameters that such files have no tensors for.
    """
    adapted = dialect.adapted(config)
    if dialect.written is not None:
        return dialect.written(adapted, shapes)
    return inverted(dialect.rules(adapted, {}), shapes, adapted)


def _unlike(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """What differs between two values, by field names; without what is of a file, and not of the model it holds."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            if not field.compare:
                continue
            yield from _unlike(getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}".lstrip("."))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _unlike(x, y, f"{where}[{i}]")
    elif not (math.isclose(a, b, rel_tol=_ROUNDING) if isinstance(a, float) and isinstance(b, float) else a == b):
        yield f"{where} is {b}"


def _shortest(value: Any) -> Any:
    """The same entries; numbers that came from float32 with as few digits as tell them apart there."""
    if isinstance(value, dict):
        return {key: _shortest(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_shortest(entry) for entry in value]
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value
