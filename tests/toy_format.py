"""A format that the package does not know: the worked example of docs/add_format.md.

"Ternary" exists nowhere: codes -1, 0 and 1 as bytes, and a scale for each group of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.checkpoint.declared import Declared
from jaxllm.checkpoint.schemes import Part, Scheme, expect
from jaxllm.entries import Entries
from jaxllm.formats.base import Axes, Cut, Weight, static_field
from jaxllm.placing import HostArray

# ---- 1. The weight: its leaves, what their axes run along, and what they mean. -------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ternary(Weight):
    """`W[o, i] = codes[o, i] * scales[o, i // group]`.

    Attributes:
        codes: int8 `[*batch, out, in]`.
        scales: float32 `[*batch, out, in / group]`.
        group: columns that share a scale.
    """

    codes: jax.Array
    scales: jax.Array
    group: int = static_field()

    @property
    def format(self) -> str:
        return f"ternary g{self.group}"

    @property
    def axes(self) -> dict[str, Axes]:
        return {"codes": (Cut("out"), Cut("in")), "scales": (Cut("out"), Cut("in", self.group))}

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        scales = jnp.repeat(jnp.asarray(self.scales), self.group, axis=-1)
        return (jnp.asarray(self.codes).astype(jnp.float32) * scales).astype(dtype)


# ---- 2. The scheme: what the tensors of a matrix are called, and the weight that they make. ------------------------


def ternary(group: int) -> Scheme:
    def build(codes: HostArray, scales: HostArray) -> Ternary:
        *lead, out, in_ = codes.shape
        expect("scales", scales, *lead, out, in_ // group)
        return Ternary(codes, scales, group)

    parts = {"codes": Part(".codes", frozenset({"int8"})), "scales": Part(".scales", frozenset({"float32"}))}
    return Scheme("ternary", parts, build)


# ---- 3. The reader: what a config's quantization_config says. READERS["ternary"] = declared_ternary. ---------------


def declared_ternary(entries: Entries, config: Mapping[str, object]) -> Declared:
    scheme = ternary(entries.integer("group_size"))
    return Declared(lambda module: [scheme], frozenset({scheme.key}))
