"""A model as a GGUF file, as llama.cpp reads it."""

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.computed import in_parts
from jaxllm.checkpoint.gguf_writing import ALIGNMENT, header
from jaxllm.checkpoint.safetensors import optional_json
from jaxllm.checkpoint.writing import Advance, File, Tensor, write_file
from jaxllm.entries import json_object
from jaxllm.errors import InputError, located
from jaxllm.exporting.model import Model, Values
from jaxllm.exporting.writer import PLAIN, WORKERS, Output, Writer, dense_shapes
from jaxllm.files import MOST_TOKENIZER, read_small
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import ENCODERS, encode
from jaxllm.models.describe import described
from jaxllm.models.family import GGUF
from jaxllm.models.rule import Written
from jaxllm.recipe import Plan, Recipe
from jaxllm.requantize import on_host
from jaxllm.tokenizer.gguf_writing import gguf_tokenizer

# llama.cpp's numbers for files whose matrices are mostly of one type (`llama_ftype`).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12}
FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XS": 22, "IQ3_XXS": 23}
FILE_TYPES |= {"IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32}
FILE_TYPES |= {"TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}


def gguf(model: Model, recipe: Recipe | None, path: Path, source: str, pool: ThreadPoolExecutor) -> Output:
    """The model as a GGUF file.

    Args:
        source: what it is made from, see `unfinished`.

    Raises:
        InputError: such a file cannot hold this model, or the type.
    """
    checkpoint, writer = model.checkpoint, Writer(model, recipe, pool)
    said = described(
        checkpoint.family, checkpoint.dialect, GGUF, checkpoint.description, checkpoint.tensors, checkpoint.config,
        model.shapes,
    )  # fmt: skip
    tensors, types = [], []
    for written in said.written:
        tensor, type = _tensor(writer, written)
        tensors.append(tensor)
        types.append((written.name, Values(model, written).shape if type in BLOCK_TYPES else tensor.shape, type))
    for name, array in said.tensors.items():
        tensors.append(Tensor(name, array.dtype, array.shape, [array]))
        types.append((name, array.shape, "F32"))
    metadata = _metadata(model, said.entries, recipe)
    text, offsets = header(metadata, types)
    file = File(path.name, text, tensors, offsets, metadata.get("general.alignment", ALIGNMENT))

    def write(advance: Advance, checksums: bool) -> None:
        write_file(path, file, advance, source, checksums)

    return Output(Plan(writer.rows), tensors, write)


def _tensor(writer: Writer, written: Written) -> tuple[Tensor, str]:
    """A tensor and its type. Vectors and routers are float32, as llama.cpp wants them."""
    values, held, path = Values(writer.model, written), writer.source_of(written), written.parts[0][0]
    type, why = writer.choice(written, values)
    if not writer.model.is_matrix(path):
        return writer.plain(written.name, values, PLAIN["F32"]), "F32"
    if type is None:  # in its own type, or as floats that hold it
        kind = held.type if isinstance(held, GGML) and not values.regrouped else "F16"
        if isinstance(held, Dense):
            kind = next((name for name, dtype in PLAIN.items() if dtype == held.values.dtype), "F32")
    else:
        kind = type.name.upper()
    if kind in PLAIN:
        writer.note(written, dense_shapes(values, PLAIN[kind]), why)
        return writer.plain(written.name, values, PLAIN[kind]), kind
    if kind not in ENCODERS and kind not in BLOCK_TYPES:
        raise InputError(
            f"a GGUF file cannot hold {kind.lower()}; it can hold {', '.join(sorted(map(str.lower, ENCODERS)))}"
        )
    size, nbytes = BLOCK_TYPES[kind][:2]
    shape = (*values.shape[:-1], values.shape[-1] // size * nbytes)
    same = values.is_in(kind)
    importance = writer.importance(written, values)

    def compute(i: int) -> np.ndarray:
        if same:  # nothing is decoded
            return values.blocks(i).reshape(values.shape[-2], -1)
        with on_host(), located(written.name):
            own = importance if importance is None or importance.ndim == 1 else importance[i]
            blocks = encode(values.matrix(i), kind, None if own is None else jnp.asarray(own))
        return np.asarray(blocks).reshape(values.shape[-2], -1)

    result = GGML(np.broadcast_to(np.uint8(0), (*values.shape[:-1], values.shape[-1] // size, nbytes)), kind)
    writer.note(written, result, f"{why}; already in it" if same else why)
    return in_parts(writer.pool, written.name, np.dtype(np.uint8), shape, compute, values.count, WORKERS), kind


def _metadata(model: Model, entries: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    checkpoint, given = model.checkpoint, model.checkpoint.description
    kind = None if recipe is None or recipe.type is None else FILE_TYPES.get(recipe.type.name.upper())
    file_type = {} if kind is None else {"general.file_type": kind}
    if checkpoint.dialect == GGUF:
        stale = ("split.", "quantize.", "general.file_type")
        kept = {key: value for key, value in given.items() if not key.startswith(stale)}
        return kept | file_type | {"general.quantization_version": 2}
    architecture = entries["general.architecture"]
    texts = {"tokenizer.ggml.model": "none"}  # llama.cpp wants to be told
    if (tokenizer := model.path / "tokenizer.json").is_file():
        said = dict(optional_json(model.path, "tokenizer_config.json").values)
        if (template := model.path / "chat_template.jinja").is_file():
            said["chat_template"] = read_small(template).decode(errors="replace")
        texts = gguf_tokenizer(json_object(read_small(tokenizer, MOST_TOKENIZER), tokenizer.name), said, given)
    elif (model.path / "tokenizer.model").is_file():
        warnings.warn(f"{model.path}: tokenizer.model is not written; make a tokenizer.json of it first", stacklevel=4)
    named = {"general.architecture": architecture, "general.type": "model", "general.name": checkpoint.name}
    return named | dict(entries) | file_type | {"general.quantization_version": 2} | texts
