"""How the names of a checkpoint become the parameters of a model: each family lists rules for each kind of file."""

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

    A group named `expert` in the pattern makes each tensor one of a stack. Several rules may match one tensor, which
    then becomes several parameters, each made of some of its rows.

    rows: given the model's config and the match, which row of the tensor each row of the parameter is (None: in order).
    present: given a tensor and the match, the tensor as `[..., out, in]`, if it is stored otherwise.
    """

    pattern: str
    target: str
    rows: Rows | None = None
    present: Present | None = None


def transposed(weight: Weight, m: re.Match | None = None) -> Weight:
    """For `Rule.present`: stored as `[in, out]`, unless it is packed; packed formats store `[out, in]` only."""
    return weight.swapped() if isinstance(weight, Dense | Scaled) else weight


def column(weight: Weight, m: re.Match) -> Weight:
    """For `Rule.present`: a vector, or a stack of them, as a matrix of one column."""
    return Dense(weight.values.reshape(*weight.shape, 1)) if isinstance(weight, Dense) else weight
