"""A family of models as one record: everything that the loader has to know of it."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers.decoder import Decoder
from jaxllm.models.rule import Rule

GGUF, HUGGING_FACE, DEEPSEEK_DEMO = "GGUF", "Hugging Face", "DeepSeek's demo"


def nothing(config: Any) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Dialect:
    """The words in which one kind of file describes models of a family.

    Attributes:
        kinds: the names of its architectures: `model_type` of a config.json, `general.architecture` of a GGUF file.
        config: from what the file says of itself and its tensors by name to the model's configuration.
        rules: given the configuration and the tensors, how tensors become parameters.
        ignored: given the configuration, patterns of names that such files may have and that mean nothing here.
    """

    kinds: tuple[str, ...]
    config: Callable[[Mapping[str, object], Mapping[str, Weight]], Any]
    rules: Callable[[Any, Mapping[str, Weight]], Sequence[Rule]]
    ignored: Callable[[Any], Sequence[str]] = nothing


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: as people call it.
        model: makes a model with its parameters declared, given the configuration, the mesh, and how many columns of a
            ROW matrix belong to one block of its format.
        config: the type of its configurations.
        dialects: by the name of the kind of file.
        options: what a user can choose for its models. For each option, the keyword arguments that tell `model` of a
            choice, by the choice's name.
        presets: descriptions of published models, in one of the dialects that JSON files have, by name.
    """

    name: str
    model: Callable[..., Decoder]
    config: type
    dialects: Mapping[str, Dialect]
    options: Mapping[str, Mapping[str, Mapping[str, object]]] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def family_of(families: Sequence[Family], dialect: str, kind: str) -> Family:
    """The family whose models files of this dialect call `kind`.

    Raises:
        InputError: there is none; lists those that there are.
    """
    known: list[str] = []
    for family in families:
        if dialect in family.dialects:
            if kind in family.dialects[dialect].kinds:
                return family
            known += family.dialects[dialect].kinds
    what = reprlib.repr(kind)
    raise InputError(f"models of type {what} are not supported; supported in {dialect} files: {', '.join(known)}")


def model_arguments(families: Sequence[Family], family: Family, options: Mapping[str, str | None]) -> dict[str, object]:
    """Keyword arguments for `family.model`, from those of the options that the user set (the others are None).

    Raises:
        InputError: an option that this family does not have, or a choice that the option does not have.
    """
    arguments: dict[str, object] = {}
    for option, choice in options.items():
        if choice is None:
            continue
        if option not in family.options:
            takers = ", ".join(other.name for other in families if option in other.options)
            raise InputError(f"{option} '{choice}' means nothing for models like {family.name}, only for {takers}")
        choices = family.options[option]
        if choice not in choices:
            raise InputError(f"{option} '{choice}': choose one of {', '.join(choices)}")
        arguments |= choices[choice]
    return arguments
