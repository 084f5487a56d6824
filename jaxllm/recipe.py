"""`Recipe`: which matrices of a model are quantized, to what, and why.

A type is chosen for each matrix by name, before anything is read, and falls back where its blocks do not fit. Norms,
biases and routers are never quantized.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxllm.encodings import ENCODINGS, Encoding, encoding, fitting
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight
from jaxllm.formats.ggml import GGML
from jaxllm.placing import Source
from jaxllm.requantize import encode_source, planned
from jaxllm.tables import table
from jaxllm.topology import Topology
from jaxllm.tracking import Statistics

ORGANIZATIONS = ("default", "moqe")
# Embedding tables and heads decide the answer, so they get a better type (as in mistral.rs and llama.cpp).
SENSITIVE = ("embed_tokens.weight", "lm_head.weight", "ends.embed_tokens_per_layer.weight")
_EXPERT = re.compile(r"\.experts\.")
HEADERS = ("matrix", "from", "to", "why", "bits")


class Choice(NamedTuple):
    """The type of one matrix (None: it stays as it is), and the reason."""

    type: Encoding | None
    why: str


class Row(NamedTuple):
    """One matrix of a plan, its shapes before and after."""

    name: str
    source: Weight
    result: Weight
    why: str


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model. Prints as a text table; a notebook shows HTML.

    Attributes:
        rows: for each matrix its name, the weight as it was, the result, and why.
    """

    rows: Sequence[Row]

    @property
    def bits(self) -> float:
        """Bits per weight of all the matrices."""
        return 8 * sum(row.result.nbytes for row in self.rows) / sum(math.prod(row.result.shape) for row in self.rows)

    def _table(self) -> list[tuple]:
        return [
            (row.name, row.source.format, row.result.format, row.why, f"{row.result.bits_per_weight:.4g}")
            for row in self.rows
        ]

    def __str__(self) -> str:
        return f"{table(self._table(), HEADERS)}\n{self.bits:.4g} bits per weight"

    def _repr_html_(self) -> str:
        return f"<p>{self.bits:.4g} bits per weight</p>{table(self._table(), HEADERS, 'html')}"


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        type: the general type; None: only what the topology names is quantized.
        organization: "default": every matrix; "moqe": routed experts only.
        topology: other types for some layers or matrices.
        importance: what is known of the activations, by the parameters' names.
    """

    type: Encoding | None
    organization: str = "default"
    topology: Topology | None = None
    importance: Mapping[str, Statistics] | None = None

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError if this means nothing for a model with these parameters."""
        if self.organization == "moqe" and not any(_EXPERT.search(name) for name in names):
            raise InputError("organization moqe: the model has no routed experts")

    def choose(self, name: str, tensor: str, shape: Sequence[int]) -> Choice:
        """The type of a parameter.

        Args:
            name: its dotted path in the model.
            tensor: its name in the file. Patterns of a topology match either.
        """
        type, why = self._wanted(name, tensor)
        if type is None:
            return Choice(None, why)
        if (fits := fitting(type, shape[-1])) != type:
            why += f"; rows of {shape[-1]} are not whole blocks of {type.block} ({type.name})"
        if fits.needs_importance and (self.importance is None or name not in self.importance):
            missing = "give an importance matrix (--imatrix)" if self.importance is None else "the one given has none"
            raise InputError(f"{fits.name} needs to know which inputs of {name} matter: {missing}; jaxllm calibrate")
        return Choice(fits, why)

    def _wanted(self, name: str, tensor: str) -> Choice:
        found = None if self.topology is None else self.topology.find((name, f"model.{name}", tensor))
        if found is not None:
            return Choice(found[1] or self.type, f"topology {found[0]}")
        if self.type is None:
            return Choice(None, "not in the topology")
        if self.organization == "moqe" and not _EXPERT.search(name):
            return Choice(None, "not a routed expert")
        if name in SENSITIVE and self.type.promoted is not None:
            return Choice(ENCODINGS[self.type.promoted], f"embedding or head, better than {self.type.name}")
        return Choice(self.type, "general type")

    def encodes(self, name: str, source: Source) -> bool:
        """Whether a parameter gets a type of this recipe's."""
        return self.choose(name, source.name, source.shape).type is not None

    def encoded(self, name: str, source: Source) -> Source:
        """A parameter's matrices as this recipe wants them. Raises InputError if they have no such encoding."""
        type = self.choose(name, source.name, source.shape).type
        if type is None or is_in(source.parts[0], type):
            return source
        with located(name):
            return encode_source(source, type, self.importance_of(name, source.shape) if type.uses_importance else None)

    def planned(self, name: str, source: Source) -> Weight:
        """The shapes of one of the results' matrices, without computing it."""
        type = self.choose(name, source.name, source.shape).type
        return source.parts[0] if type is None else planned(source.shape[-2:], type)

    def importance_of(self, name: str, shape: Sequence[int]) -> np.ndarray | None:
        """Mean squares for a parameter of this shape; None: not known."""
        if self.importance is None or name not in self.importance:
            return None
        importance = self.importance[name].importance
        if importance.shape[-1] != shape[-1] or (importance.ndim == 2 and importance.shape[0] != shape[0]):
            raise InputError(f"the importance of {name} has shape {[*importance.shape]}, but its matrix {[*shape]}")
        return importance


def is_in(weight: Weight, type: Encoding) -> bool:
    """Whether a weight is in this type already, so that its bits can stay."""
    return isinstance(weight, GGML) and weight.type == type.name.upper()


def recipe(
    type: str | int | None,
    organization: str | None = None,
    topology: str | os.PathLike | Topology | None = None,
    importance: Mapping[str, Statistics] | None = None,
) -> Recipe | None:
    """The recipe for what users write; None if nothing is to be quantized.

    Raises:
        InputError: there is no such type or organization, or the topology cannot be used.
    """
    if type is None and topology is None:
        for option, value in (("organization", organization), ("imatrix", importance)):
            if value is not None:
                raise InputError(f"{option} is for quantizing: name a type to quantize to")
        return None
    if organization is not None and organization not in ORGANIZATIONS:
        raise InputError(f"organization '{organization}': choose one of {', '.join(ORGANIZATIONS)}")
    chosen = topology if isinstance(topology, Topology | None) else Topology.read(topology)
    return Recipe(None if type is None else encoding(type), organization or "default", chosen, importance)
