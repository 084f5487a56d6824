"""From a path to a checkpoint: finds its kind of file and the family of its model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

    config: the model's configuration, of its family's type.
    rules, ignored: how its tensors become parameters, see `Rule`; patterns of tensor names that are not needed.
    max_batch_size: how many prompts are answered together; None: the checkpoint does not say.
    dialect, description: as in `Opened`, for those who write the model as another checkpoint.
    """

    name: str
    family: Family
    config: Any
    tensors: Mapping[str, Weight]
    rules: Sequence[Rule]
    ignored: Sequence[str]
    texts: Texts
    max_batch_size: int | None = None
    dialect: str = ""
    description: Mapping[str, Any] = field(default_factory=dict)


def open_checkpoint(path: Path, **options: object) -> Checkpoint:
    """Open a checkpoint of any kind; see `containers.CONTAINERS` for the kinds and their options.

    Raises:
        InputError: it cannot be read, or its model is not supported.
    """
    with located(path):
        opened = open_container(path, options)
        family = family_of(FAMILIES, opened.dialect, opened.kind)
        dialect, tensors = family.dialects[opened.dialect], opened.tensors
        config = dialect.config(opened.description, tensors)
        rules, ignored = dialect.rules(config, tensors), dialect.ignored(config)
    batch, described = opened.max_batch_size, opened.description
    return Checkpoint(
        opened.name, family, config, tensors, rules, ignored, opened.texts, batch, opened.dialect, described
    )
