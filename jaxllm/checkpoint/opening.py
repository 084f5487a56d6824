"""From a path to a checkpoint: the container that it is in, and the family that its model belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.containers import open_container
from jaxllm.checkpoint.texts import Texts
from jaxllm.errors import located
from jaxllm.formats.base import Weight
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import Family, family_of
from jaxllm.models.rule import Rule


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and whose model is known.

    config: of the model, as its family has it.
    rules, ignored: how its tensors become parameters, see `Rule`; patterns of names that mean nothing.
    max_batch_size: how many prompts it asks to be answered together; None: it does not say.
    """

    name: str
    family: Family
    config: Any
    tensors: Mapping[str, Weight]
    rules: Sequence[Rule]
    ignored: Sequence[str]
    texts: Texts
    max_batch_size: int | None = None


def open_checkpoint(path: Path, **options: object) -> Checkpoint:
    """Open whatever `path` is; see `containers.CONTAINERS` for the kinds of files, and for their options.

    Raises:
        InputError: it cannot be read, or is of a model that is not supported.
    """
    with located(path):
        opened = open_container(path, options)
        family = family_of(FAMILIES, opened.dialect, opened.kind)
        dialect, tensors = family.dialects[opened.dialect], opened.tensors
        config = dialect.config(opened.description, tensors)
        rules, ignored = dialect.rules(config, tensors), dialect.ignored(config)
    return Checkpoint(opened.name, family, config, tensors, rules, ignored, opened.texts, opened.max_batch_size)
