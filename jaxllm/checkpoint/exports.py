"""A weight as the tensors that others know it by, and what config.json has to say of them: the inverse of reading.

The table is `EXPORTS`, by container and type. What a type's tensors look like is in `exports_integers` and
`exports_floats`, what the config says in `exports_declared`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint import exports_declared as said
from jaxllm.checkpoint import exports_floats as floats
from jaxllm.checkpoint import exports_integers as integers
from jaxllm.checkpoint.exports_integers import Laid
from jaxllm.checkpoint.repack import words_shape
from jaxllm.encodings import encoding
from jaxllm.errors import InputError
from jaxllm.formats.affine import Affine
from jaxllm.formats.base import Weight

NO_GROUPS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Export:
    """How a directory holds matrices of one type.

    Attributes:
        name: the type, as users write it.
        container: "huggingface" or "mlx".
        encoding: the encoding that makes such weights; those of GPTQ and AWQ need calibration and are not in ENCODINGS.
        takes: from the sizes of a matrix, the weight that is written, with shapes as leaves.
        lay: its tensors, by the end of the name.
        declare: see `declaration`.
    """

    name: str
    container: str
    encoding: str
    takes: Callable[[tuple[int, ...]], Weight]
    lay: Callable[[Weight], Laid]
    declare: said.Declare

    def tensors(self, module: str, weight: Weight) -> dict[str, np.ndarray]:
        """The tensors of a matrix by their complete names.

        Args:
            module: such as "model.layers.0.self_attn.q_proj".
            weight: `[out, in]`, or a stack `[experts, out, in]` if the type has such files.

        Raises:
            InputError: the type cannot hold this matrix.
        """
        try:
            return {module + end: array.read() for end, array in self.lay(weight).items()}
        except InputError as error:
            raise InputError(f"'{module}' as {self.name}: {error}") from error

    def declaration(self, left_out: Sequence[str], groups: Mapping[str, int] = NO_GROUPS) -> dict[str, Any]:
        """The entries for config.json.

        Args:
            left_out: the modules with matrices that are not quantized, such as "lm_head".
            groups: for each quantized module, how many columns have a scale (`group` of its weight). Without it, all
                have the usual number.

        Raises:
            InputError: the sizes differ, and the type knows only one.
        """
        return self.declare(left_out, groups)


def planned(export: Export, module: str, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """What `export.tensors` will give for a matrix of this shape, without its values.

    Raises:
        InputError: the type cannot hold such a matrix.
    """
    try:
        laid = export.lay(export.takes(tuple(shape)))
    except InputError as error:
        raise InputError(f"'{module}' as {export.name}: {error}") from error
    return {module + end: jax.ShapeDtypeStruct(array.shape, array.dtype) for end, array in laid.items()}


def export(container: str, type: str) -> Export:
    """The way in which a container holds a type. Raises InputError, which lists the known ones."""
    if found := EXPORTS.get((container, type)):
        return found
    known = [name for where, name in EXPORTS if where == container]
    if not known:
        raise InputError(f"container '{container}': choose one of {', '.join(sorted({c for c, _ in EXPORTS}))}")
    raise InputError(f"{container} cannot hold '{type}'; it can hold {', '.join(known)}")


@cache
def _encoded(name: str, shape: tuple[int, ...]) -> Weight:
    return jax.eval_shape(lambda w: encoding(name).encode(w, None), jax.ShapeDtypeStruct(shape, jnp.float32))


def integer_shapes(bits: int, group: int, shape: tuple[int, ...]) -> Affine:
    """What encoders that are calibrated make: float16 scales and integer zero points."""
    if len(shape) != 2:
        raise InputError(f"a stack {[*shape]}, where such files hold single matrices")
    out, in_ = shape
    grid = out, -(-in_ // group)
    codes = jax.ShapeDtypeStruct(words_shape(out, in_, bits), jnp.uint32)
    scales, zeros = (jax.ShapeDtypeStruct(grid, dtype) for dtype in (jnp.float16, jnp.uint8))
    return Affine(codes, scales, bits, group, "GPTQ", zeros=zeros)


def _of(
    container: str, name: str, made_by: str, lay: Callable[[Weight], Laid], declare: said.Declare
) -> tuple[tuple[str, str], Export]:
    return (container, name), Export(name, container, made_by, partial(_encoded, made_by), lay, declare)


def gptq(bits: int, symmetric: bool = True, ordered: bool = False, group: int = 128) -> Export:
    """GPTQ of any kind; see `exports_integers.gptq`. `EXPORTS` has those whose columns are in order."""
    name = f"gptq{bits}{'' if symmetric else '_asym'}{'_act_order' if ordered else ''}"
    lay = partial(integers.gptq, symmetric=symmetric, ordered=ordered)
    declare = said.gptq(bits, symmetric, ordered)
    return Export(name, "huggingface", name, partial(integer_shapes, bits, group), lay, declare)


def awq(group: int = 128) -> Export:
    return Export("awq", "huggingface", "awq", partial(integer_shapes, 4, group), integers.awq, said.awq)


_PLAIN = (("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32"))
_CALIBRATED = (*(gptq(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)), awq())
EXPORTS: dict[tuple[str, str], Export] = dict(
    (
        *(_of("huggingface", n, e, partial(floats.dense, stacks=""), said.nothing) for n, e in _PLAIN),
        _of("huggingface", "fp8_block", "fp8_block", floats.block_fp8, said.block_fp8),
        _of("huggingface", "fp8", "fp8", floats.row_fp8, said.ROW_FP8),
        _of("huggingface", "mxfp8", "mxfp8", floats.mxfp8_compressed, said.MXFP8),
        _of("huggingface", "mxfp4", "mxfp4", floats.mxfp4_compressed, said.MXFP4),
        _of("huggingface", "mxfp4_experts", "mxfp4", floats.mxfp4_experts, said.gpt_oss),
        _of("huggingface", "nvfp4", "nvfp4", floats.nvfp4_compressed, said.NVFP4),
        *(_of("huggingface", kind, kind, floats.bnb_4bit, said.bitsandbytes(kind)) for kind in ("nf4", "fp4")),
        _of("huggingface", "int8", "int8", integers.int8, said.INT8),
        _of("huggingface", "llm_int8", "int8", integers.llm_int8, said.bitsandbytes("int8")),
        _of("huggingface", "int4", "int4", integers.pack_quantized, said.INT4),
        *(((e.container, e.name), e) for e in _CALIBRATED),
        *(_of("mlx", n, e, partial(floats.dense, stacks=".weight"), said.nothing) for n, e in _PLAIN),
        *(_of("mlx", f"afq{b}", f"afq{b}", integers.mlx, said.mlx(b, "affine", None)) for b in (2, 3, 4, 5, 6, 8)),
        _of("mlx", "mxfp4", "mxfp4", floats.mxfp4_mlx, said.mlx(4, "mxfp4", 32)),
        _of("mlx", "nvfp4", "nvfp4_mlx", floats.nvfp4_mlx, said.mlx(4, "nvfp4", 16)),
        _of("mlx", "mxfp8", "mxfp8", floats.mxfp8_mlx, said.mlx(8, "mxfp8", 32)),
    )
)
