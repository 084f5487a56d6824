"""A family of models as one record: everything that the loader needs to know about it."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.adapted import LowRank
from jaxllm.formats.base import Weight
from jaxllm.layers.decoder import Decoder
from jaxllm.models.rule import Rule, Written

GGUF, HUGGING_FACE, DEEPSEEK_DEMO = "GGUF", "Hugging Face", "DeepSeek's demo"


def nothing(config: Any) -> Sequence[str]:
    return ()


def unchanged(config: Any) -> Any:
    return config


def undivided(config: Any, path: str, change: LowRank) -> Mapping[str, LowRank]:
    return {}


@dataclass(frozen=True)
class Dialect:
    """How one kind of file describes models of a family.

    Attributes:
        kinds: the names of its architectures: `model_type` of a config.json, `general.architecture` of a GGUF file.
        config: makes the model's configuration from the file's description and its tensors by name.
        rules: given the configuration and the tensors, the rules by which tensors become parameters.
        ignored: given the configuration, patterns of tensor names that such files may have and we do not need.

    To write such files (`models.describe`); None where we do not:
        adapted: a configuration from any kind of file as one of this kind would have it.
        describes: the inverse of `config`: the description, from such a configuration and rotary settings (see
            `models.rope_describing`).
        rotary: the rotary settings in the file's description and its tensors.
        written: given such a configuration and the shapes of its parameters, the tensors that hold them; None: those
            that `rules` would read.
    """

    kinds: tuple[str, ...]
    config: Callable[[Mapping[str, object], Mapping[str, Weight]], Any]
    rules: Callable[[Any, Mapping[str, Weight]], Sequence[Rule]]
    ignored: Callable[[Any], Sequence[str]] = nothing
    adapted: Callable[[Any], Any] = unchanged
    describes: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    rotary: Callable[[Mapping[str, object], Mapping[str, Weight]], dict[str, Any]] | None = None
    written: Callable[[Any, Mapping[str, tuple[int, ...]]], list[Written]] | None = None


@dataclass(frozen=True)
class MatFormer:
    """How smaller models are cut out of a family's models, which were trained for that (Devvrit et al., 2023).

    Attributes:
        config: given a configuration, the layers that are kept, and the width of each one's feed-forward block: the
            smaller model's configuration. Raises InputError if there is no such model.
        places: given the configuration, the smaller model's, the layers that are kept, and the path of a parameter in
            the larger model: its rows and its columns that are kept (None: all).
        description: given a config.json and the smaller model's configuration, the smaller model's config.json.
    """

    config: Callable[[Any, Sequence[int], Sequence[int]], Any]
    places: Callable[[Any, Any, Sequence[int], str], tuple[np.ndarray | None, np.ndarray | None]]
    description: Callable[[Mapping[str, Any], Any], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A family of models that share an architecture.

    Attributes:
        name: its common name.
        model: makes a model with its parameters declared, given the configuration, the mesh, and how many columns of a
            ROW matrix belong to one block of its format.
        config: the type of its configurations.
        dialects: its dialects by kind of file.
        options: what a user can choose for its models: for each option, the choices by name, each with the keyword
            arguments that it adds to the call of `model`.
        presets: descriptions of published models by name, each in a dialect of a JSON file.
        divided: given a configuration, the path of a parameter that its model does not have, and an adapter's change of
            it: the changes of those parameters that the model holds in its place.
        matformer: how its models are sliced; None: they cannot be. The first group in patterns of its rules for layers
            has to be the layer's number.
    """

    name: str
    model: Callable[..., Decoder]
    config: type
    dialects: Mapping[str, Dialect]
    options: Mapping[str, Mapping[str, Mapping[str, object]]] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    divided: Callable[[Any, str, LowRank], Mapping[str, LowRank]] = undivided
    matformer: MatFormer | None = None


def family_of(families: Sequence[Family], dialect: str, kind: str) -> Family:
    """The family that has the name `kind` in files of this dialect.

    Raises:
        InputError: there is none; the message lists the known ones.
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
    """Keyword arguments for `family.model`, from the options that the user set (the others are None).

    Raises:
        InputError: this family does not have the option, or the option does not have the choice.
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
