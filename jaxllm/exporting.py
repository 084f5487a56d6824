"""A model as another checkpoint: in a GGUF file, or in a directory as Hugging Face's transformers or MLX hold it.

The rules by which a family's files are read, inverted, say which tensors there have to be; a recipe says which types;
the values are read, decoded, encoded and laid out matrix by matrix while the files are written.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.checkpoint import matching
from jaxllm.checkpoint.computed import in_parts, together
from jaxllm.checkpoint.exports import Export
from jaxllm.checkpoint.exports import planned as planned_tensors
from jaxllm.checkpoint.gguf_writing import ALIGNMENT, header
from jaxllm.checkpoint.opening import Checkpoint
from jaxllm.checkpoint.writing import Advance, File, Tensor, write_directory, write_file
from jaxllm.declaration import Declaration
from jaxllm.encodings import ENCODINGS, Encoding
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import ENCODERS
from jaxllm.layers.parameter import parameters
from jaxllm.models.describe import described
from jaxllm.models.family import GGUF, HUGGING_FACE
from jaxllm.models.rule import Written, inverted
from jaxllm.parallel import make_mesh
from jaxllm.placing import Source
from jaxllm.recipe import SENSITIVE, Plan, Recipe, Row
from jaxllm.requantize import encoded, floats, on_host
from jaxllm.tokenizer.gguf_writing import gguf_tokenizer, huggingface_tokenizer, special_ids

CONTAINERS = ("gguf", "huggingface", "mlx")
WORKERS = 2  # matrices that are encoded at the same time; each uses several cores in part
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
BFLOAT16 = _PLAIN["BF16"]


@dataclass(frozen=True)
class Model:
    """A model that is to be written.

    Attributes:
        checkpoint: where it comes from; its folder or file is `path`.
        sources: where each parameter comes from.
        declared: each parameter's declaration.
        made: weights that are encoded already, by parameter (GPTQ and AWQ, which need calibration).
    """

    checkpoint: Checkpoint
    path: Path
    sources: Mapping[str, Source]
    declared: Mapping[str, Declaration]
    made: Mapping[str, Weight] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: declared.shape for name, declared in self.declared.items()}

    def is_matrix(self, name: str) -> bool:
        """Whether a parameter may be quantized."""
        return len(self.declared[name].shape) > 1 and not self.declared[name].keep


def read_model(checkpoint: Checkpoint, path: Path) -> Model:
    """The model of an opened checkpoint. Raises InputError if its tensors do not fit."""
    sketch = checkpoint.family.model(checkpoint.config, make_mesh(), 1)
    sources = matching.match(sketch, checkpoint.tensors, checkpoint.rules, checkpoint.ignored)
    declared = {name: param.declared for name, param in parameters(sketch).items()}
    return Model(checkpoint, path, sources, declared)


@dataclass(frozen=True)
class Output:
    """A checkpoint that can be written.

    Attributes:
        plan: what becomes of each matrix.
        tensors: everything that will be written.
        write: writes it, calling its argument with numbers of bytes.
    """

    plan: Plan
    tensors: Sequence[Tensor]
    write: Callable[[Advance], None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class _Values:
    """The values of a tensor that is to be written, as floats: matrices one by one.

    Attributes:
        shape: the tensor's shape as it is encoded, `[out]`, `[out, in]` or `[count, out, in]`.
        count: how many matrices there are; 1 for a vector.
    """

    def __init__(self, model: Model, written: Written) -> None:
        self.written = written
        self.sources = [(model.sources[path], number) for path, number in written.parts]
        shapes = [model.declared[path].shape for path, _ in written.parts]
        turned = written.turned or (False,) * len(shapes)
        sizes = [shape[-2:] if len(shape) > 1 else shape for shape in shapes]
        sizes = [size[::-1] if turn else size for size, turn in zip(sizes, turned, strict=True)]
        rows = sum(size[0] for size in sizes) if written.rows is None else len(written.rows)
        matrix = (rows, *sizes[0][1:])
        self.count = written.stack or (shapes[0][0] if len(shapes[0]) == 3 and written.parts[0][1] is None else 1)
        if written.stack:
            matrix = (rows // written.stack, matrix[1])
            matrix = matrix[::-1] if written.transposed else matrix
        stacked = written.stack or self.count > 1 or (len(shapes[0]) == 3 and written.parts[0][1] is None)
        self.shape: tuple[int, ...] = (self.count, *matrix) if stacked else matrix
        self.is_matrix = len(matrix) > 1
        self._joined: jax.Array | None = None

    @property
    def regrouped(self) -> bool:
        """Whether these are other matrices than the parameters'."""
        return bool(self.written.stack or self.written.turned)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file, if it is stored as plain numbers."""
        if self.written.column:
            return self.shape[:-1]
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self._stored_transposed else self.shape

    @property
    def _stored_transposed(self) -> bool:
        return self.written.transposed and not self.written.stack

    def matrix(self, i: int) -> jax.Array:
        """Matrix i of a stack, or the only one, or the vector: float32, in the order of the file."""
        if not self.written.stack:
            return self._whole(i)
        if self._joined is None:
            self._joined = self._whole(0)
        rows = len(self._joined) // self.count
        with on_host():
            part = self._joined[i * rows : (i + 1) * rows]
            return part.T if self.written.transposed else part

    def _whole(self, i: int) -> jax.Array:
        parts = [floats(source, i if number is None else number) for source, number in self.sources]
        with on_host():
            if self.written.turned:
                parts = [part.T if turn else part for part, turn in zip(parts, self.written.turned, strict=True)]
            joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
            return joined if self.written.rows is None else joined[self.written.rows]

    def plain(self, i: int, dtype: np.dtype) -> np.ndarray:
        """The same as plain numbers, as they are stored."""
        values = np.asarray(self.matrix(i))
        if self.written.column:
            values = values[..., 0]
        return (values.T if self._stored_transposed else values).astype(dtype)


class _Writer:
    """What the containers share: which type each tensor gets, and how plain tensors are made."""

    def __init__(self, model: Model, recipe: Recipe | None, pool: ThreadPoolExecutor) -> None:
        self.model, self.recipe, self.pool = model, recipe, pool
        self.rows: list[Row] = []
        if recipe is not None:
            recipe.check(model.sources)

    def choice(self, written: Written, values: _Values) -> tuple[Encoding | None, str]:
        path = written.parts[0][0]
        if self.recipe is None or not self.model.is_matrix(path):
            return None, "as it is"
        return self.recipe.choose(path, self.model.sources[path].name, values.shape)

    def importance(self, written: Written, values: _Values) -> np.ndarray | None:
        path, number = written.parts[0]
        if values.regrouped:
            return None
        known = None if self.recipe is None else self.recipe.importance_of(path, self.model.declared[path].shape)
        return known if known is None or number is None or known.ndim == 1 else known[number]

    def source_of(self, written: Written) -> Weight:
        return self.model.sources[written.parts[0][0]].parts[0]

    def plain(self, name: str, values: _Values, dtype: np.dtype) -> Tensor:
        def compute(i: int) -> np.ndarray:
            return values.plain(i, dtype)

        return in_parts(self.pool, name, dtype, values.stored, compute, values.count, WORKERS)

    def note(self, written: Written, result: Weight, why: str) -> None:
        path, number = written.parts[0]
        if len(self.model.declared[path].shape) > 1 and not number:  # one row for all experts of a layer
            self.rows.append(Row(written.name, self.source_of(written), result, why))


def _dense_shapes(values: _Values, dtype: np.dtype) -> Dense:
    return Dense(np.broadcast_to(np.zeros((), dtype), values.stored))


# GGUF


def gguf(model: Model, recipe: Recipe | None, path: Path, source: str, pool: ThreadPoolExecutor) -> Output:
    """The model as a GGUF file.

    Args:
        source: what it is made from, see `unfinished`.

    Raises:
        InputError: such a file cannot hold this model, or the type.
    """
    checkpoint, writer = model.checkpoint, _Writer(model, recipe, pool)
    said = described(
        checkpoint.family, checkpoint.dialect, GGUF, checkpoint.description, checkpoint.tensors, checkpoint.config,
        model.shapes,
    )  # fmt: skip
    tensors, types = [], []
    for written in said.written:
        tensor, type = _gguf_tensor(writer, written)
        tensors.append(tensor)
        types.append((written.name, _Values(model, written).shape if type in BLOCK_TYPES else tensor.shape, type))
    for name, array in said.tensors.items():
        tensors.append(Tensor(name, array.dtype, array.shape, [array]))
        types.append((name, array.shape, "F32"))
    text, offsets = header(_gguf_metadata(model, said.entries, recipe), types)
    file = File(path.name, text, tensors, offsets, ALIGNMENT)
    return Output(Plan(writer.rows), tensors, lambda advance: write_file(path, file, advance, source))


def _gguf_tensor(writer: _Writer, written: Written) -> tuple[Tensor, str]:
    """A tensor and its type. Vectors and routers are float32, as llama.cpp wants them."""
    values, held, path = _Values(writer.model, written), writer.source_of(written), written.parts[0][0]
    type, why = writer.choice(written, values)
    if not writer.model.is_matrix(path):
        return writer.plain(written.name, values, _PLAIN["F32"]), "F32"
    if type is None:  # in its own type, or as floats that hold it
        kind = held.type if isinstance(held, GGML) and not values.regrouped else "F16"
        if isinstance(held, Dense):
            kind = next(name for name, dtype in _PLAIN.items() if dtype == held.values.dtype)
    else:
        kind = type.name.upper()
    if kind in _PLAIN:
        writer.note(written, _dense_shapes(values, _PLAIN[kind]), why)
        return writer.plain(written.name, values, _PLAIN[kind]), kind
    if kind not in ENCODERS and kind not in BLOCK_TYPES:
        raise InputError(
            f"a GGUF file cannot hold {kind.lower()}; it can hold {', '.join(sorted(map(str.lower, ENCODERS)))}"
        )
    size, nbytes, _ = BLOCK_TYPES[kind]
    shape = (*values.shape[:-1], values.shape[-1] // size * nbytes)
    same = isinstance(held, GGML) and held.type == kind and len(written.parts) == 1 and not values.regrouped
    importance = writer.importance(written, values)

    def compute(i: int) -> np.ndarray:
        if same:  # nothing is decoded
            return _blocks(values, i).reshape(values.shape[-2], -1)
        own = importance if importance is None or importance.ndim == 1 else importance[i]
        with on_host():
            weight = GGML.from_dense(values.matrix(i), kind, own)
        return np.asarray(weight.blocks).reshape(values.shape[-2], -1)

    result = GGML(np.broadcast_to(np.uint8(0), (*values.shape[:-1], values.shape[-1] // size, nbytes)), kind)
    writer.note(written, result, f"{why}; already in it" if same else why)
    return in_parts(writer.pool, written.name, np.dtype(np.uint8), shape, compute, values.count, WORKERS), kind


def _blocks(values: _Values, i: int) -> np.ndarray:
    """The blocks of a matrix as they are, rows in the order of the new file."""
    [(source, number)], index = values.sources, ()
    part = source.parts[(i if number is None else number) if source.stacked else 0]
    if len(part.shape) > 2:
        index = np.unravel_index(i if number is None else number, part.shape[:-2])
    blocks = np.asarray(part.leaf("blocks")[index])
    blocks = blocks if source.rows is None else blocks[source.rows]
    return blocks if values.written.rows is None else blocks[values.written.rows]


FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12}
FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XS": 22, "IQ3_XXS": 23}
FILE_TYPES |= {"IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32}
FILE_TYPES |= {"TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}  # llama.cpp's llama_ftype


def _gguf_metadata(model: Model, entries: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    checkpoint, given = model.checkpoint, model.checkpoint.description
    kind = None if recipe is None or recipe.type is None else FILE_TYPES.get(recipe.type.name.upper())
    file_type = {} if kind is None else {"general.file_type": kind}
    if checkpoint.dialect == GGUF:
        kept = {key: value for key, value in given.items() if not key.startswith("split.")}
        return kept | file_type | {"general.quantization_version": 2}
    architecture = entries["general.architecture"]
    texts = {"tokenizer.ggml.model": "none"}  # llama.cpp wants to be told
    if (model.path / "tokenizer.json").is_file():
        said = _json(model.path / "tokenizer_config.json")
        if (template := model.path / "chat_template.jinja").is_file():
            said["chat_template"] = template.read_text(encoding="utf-8")
        texts = gguf_tokenizer(_json(model.path / "tokenizer.json"), said, given)
    named = {"general.architecture": architecture, "general.type": "model", "general.name": checkpoint.name}
    return named | dict(entries) | file_type | {"general.quantization_version": 2} | texts


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# Directories


def directory(
    model: Model,
    recipe: Recipe | None,
    how: Export,
    path: Path,
    others: Mapping[str, Path | bytes],
    limit: int,
    source: str,
    pool: ThreadPoolExecutor,
) -> Output:
    """The model as a directory of safetensors.

    Args:
        how: the type of its matrices.
        others: the source's files that come along, without its configuration.
        limit: the size of a file.
        source: what it is made from, see `unfinished`.

    Raises:
        InputError: such a directory cannot hold this model.
    """
    checkpoint, writer = model.checkpoint, _Writer(model, recipe, pool)
    files = dict(others)
    if checkpoint.dialect == HUGGING_FACE:
        entries = {k: v for k, v in checkpoint.description.items() if k not in ("quantization_config", "quantization")}
        names = [*checkpoint.tensors]
        rules = [rule for rule in checkpoint.rules if any(re.fullmatch(rule.pattern, name) for name in names)]
        wanted = inverted(rules, model.shapes, checkpoint.config)
    else:
        said = described(
            checkpoint.family, checkpoint.dialect, HUGGING_FACE, checkpoint.description, checkpoint.tensors,
            checkpoint.config, model.shapes,
        )  # fmt: skip
        entries, wanted = said.entries, said.written
        if checkpoint.dialect == GGUF and checkpoint.texts.tokenizer is not None:
            files |= huggingface_tokenizer(checkpoint.description)
            entries = entries | special_ids(checkpoint.description)
    dtype = _other_dtype(model, how)
    tensors: list[Tensor] = []
    left_out: list[str] = []
    groups: dict[str, int] = {}
    for written in wanted:
        tensors += _directory_tensors(writer, written, how, dtype, left_out, groups)
    key = "dtype" if "dtype" in entries else "torch_dtype"
    config = {**entries, key: dtype.name} | how.declaration(sorted(left_out), groups)
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()

    def write(advance: Advance) -> None:
        write_directory(path, tensors, files, limit, advance, source)

    return Output(Plan(writer.rows), tensors, write)


def _other_dtype(model: Model, how: Export) -> np.dtype:
    """The dtype of what is not quantized: that of the source's floats, or bfloat16 for files that mix dtypes."""
    plain = {"bfloat16": BFLOAT16, "float16": _PLAIN["F16"], "float32": _PLAIN["F32"]}
    if how.name in plain:
        return plain[how.name]
    matrices = {
        part.values.dtype
        for name, source in model.sources.items()
        if len(model.declared[name].shape) > 1
        for part in source.parts
        if isinstance(part, Dense)
    }
    only = matrices.pop() if len(matrices) == 1 else None
    return only if only is not None and model.checkpoint.dialect == HUGGING_FACE else BFLOAT16


def _directory_tensors(
    writer: _Writer, written: Written, how: Export, dtype: np.dtype, left_out: list[str], groups: dict[str, int]
) -> list[Tensor]:
    values, path = _Values(writer.model, written), written.parts[0][0]
    module, _, kind = written.name.rpartition(".")
    module = module if kind == "weight" else written.name
    type, why = _directory_choice(writer, written, values, how)
    made = writer.model.made.get(path)
    if made is not None and (number := written.parts[0][1]) is not None:
        made = jax.tree.map(lambda leaf: leaf[number], made)
    if type is None and made is None:
        if len(values.shape) > 1 and kind != "bias":
            writer.note(written, _dense_shapes(values, dtype), why)
            if how.name not in ("bfloat16", "float16", "float32"):
                left_out.append(module)
        exact = "correction_bias" in written.name  # rounding it changes which experts are chosen
        return [writer.plain(written.name, values, _PLAIN["F32"] if exact else dtype)]
    sizes = planned_tensors(how, module, values.shape)
    importance = writer.importance(written, values)

    def compute() -> Mapping[str, np.ndarray]:
        if made is not None:
            return how.tensors(module, made)
        assert type is not None
        with on_host():
            matrices = [values.matrix(i) for i in range(values.count)]
            whole = matrices[0] if len(values.shape) == 2 else jnp.stack(matrices)
            return how.tensors(module, encoded(whole, type, importance if type.uses_importance else None))

    result = how.takes(values.shape) if made is None else made
    groups |= {module: result.group} if hasattr(result, "group") else {}
    writer.note(written, result, why)
    return together(writer.pool, sizes, compute)


def _directory_choice(writer: _Writer, written: Written, values: _Values, how: Export) -> tuple[Encoding | None, str]:
    """The type of a tensor, or why it stays plain."""
    path = written.parts[0][0]
    if not writer.model.is_matrix(path) or how.name in ("bfloat16", "float16", "float32"):
        return None, f"as {how.name}"
    if how.container != "mlx" and path in SENSITIVE:
        return None, "embeddings and heads stay plain in such directories"
    if path in writer.model.made:
        return None, "calibrated"
    type, why = writer.choice(written, values)
    if path in SENSITIVE and how.encoding in ENCODINGS:
        type, why = ENCODINGS[how.encoding], "general type"
    if type is None or type.name != how.encoding:
        return None, why
    try:
        planned_tensors(how, "matrix", values.shape)
    except InputError as error:
        return None, str(error)
    return type, why
