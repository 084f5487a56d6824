"""How a checkpoint's tensors become a model's parameters: each family lists rules for each kind of file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Scaled

Rows = Callable[[Any, re.Match], np.ndarray]
Present = Callable[[Weight, re.Match], Weight]


@dataclass(frozen=True)
class Rule:
    """Tensors whose full name matches `pattern` become the parameter `target` (a template for `re.Match.expand`).

    If the pattern has a group named `expert`, each tensor is one matrix of a stack. Several rules may match one tensor:
    it then becomes several parameters, each made of some of its rows.

    rows: given the model's config and the match, the tensor's row for each row of the parameter (None: in order).
    present: given a tensor and the match, the tensor as `[..., out, in]`, for tensors that are stored differently.
    """

    pattern: str
    target: str
    rows: Rows | None = None
    present: Present | None = None


def transposed(weight: Weight, m: re.Match | None = None) -> Weight:
    """For `Rule.present`: a tensor stored as `[in, out]`. Packed tensors are always `[out, in]` and stay unchanged."""
    return weight.swapped() if isinstance(weight, Dense | Scaled) else weight


def column(weight: Weight, m: re.Match) -> Weight:
    """For `Rule.present`: a vector, or a stack of them, as a matrix of one column."""
    return Dense(weight.values.reshape(*weight.shape, 1)) if isinstance(weight, Dense) else weight
