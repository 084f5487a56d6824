"""A model as a directory of safetensors, as transformers, vLLM or MLX read it."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.computed import together
from jaxllm.checkpoint.exports import Export, export, planned
from jaxllm.checkpoint.writing import Advance, Tensor, write_directory
from jaxllm.encodings import ENCODINGS, Encoding, fitting
from jaxllm.errors import InputError, located
from jaxllm.exporting.model import Model, Values, as_in_the_source
from jaxllm.exporting.writer import PLAIN, Output, Writer, dense_shapes
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.models.describe import described
from jaxllm.models.family import GGUF, HUGGING_FACE
from jaxllm.models.rule import Written
from jaxllm.recipe import SENSITIVE, Plan, Recipe
from jaxllm.requantize import encoded, on_host
from jaxllm.tokenizer.gguf_writing import huggingface_tokenizer, special_ids

DTYPES = {"bfloat16": PLAIN["BF16"], "float16": PLAIN["F16"], "float32": PLAIN["F32"]}


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
    writer, (entries, wanted, texts) = Writer(model, recipe, pool), hugging_face(model)
    files = {**others, **texts}
    if how.container == "mlx":
        wanted = stacked(wanted, "switch_mlp")
    if how == export("huggingface", "mxfp4") and any(_is_stack(model, written) for written in wanted):
        how = export("huggingface", "mxfp4_experts")  # as GPT-OSS has them, beside plain matrices
    dtype = DTYPES.get(how.name) or other_dtype(model)
    tensors: list[Tensor] = []
    left_out: list[str] = []
    groups: dict[str, int] = {}
    for written in wanted:
        tensors += _tensors(writer, written, how, dtype, left_out, groups)
    key = "dtype" if "dtype" in entries else "torch_dtype"
    config = {**entries, key: dtype.name} | how.declaration(sorted(left_out), groups)
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()

    def write(advance: Advance, checksums: bool) -> None:
        write_directory(path, tensors, files, limit, advance, source, checksums)

    return Output(Plan(writer.rows), tensors, write)


def hugging_face(model: Model) -> tuple[dict[str, Any], Sequence[Written], Mapping[str, bytes]]:
    """The model as Hugging Face's directories have it: config.json without quantization, the tensors, and other files
    that the source does not have. Raises InputError if they cannot hold it."""
    checkpoint = model.checkpoint
    if checkpoint.dialect == HUGGING_FACE:
        entries = {k: v for k, v in checkpoint.description.items() if k not in ("quantization_config", "quantization")}
        return entries, as_in_the_source(checkpoint), {}
    said = described(
        checkpoint.family, checkpoint.dialect, HUGGING_FACE, checkpoint.description, checkpoint.tensors,
        checkpoint.config, model.shapes,
    )  # fmt: skip
    if checkpoint.dialect != GGUF or checkpoint.texts.tokenizer is None:
        return said.entries, said.written, {}
    ids = special_ids(checkpoint.description)
    return said.entries | ids, said.written, huggingface_tokenizer(checkpoint.description)


def stacked(wanted: Sequence[Written], block: str) -> list[Written]:
    """Single experts as the stacks that `block`, in their place, has in MLX's and mistral.rs's files."""
    stacks = {}
    for written in wanted:
        path, number = written.parts[0]
        name = re.sub(r"experts\.\d+\.\w+\.weight$", f"{block}.{path.rpartition('.')[2]}.weight", written.name)
        stacks[name] = written if number is None else Written(name, ((path, None),), None)
    return list(stacks.values())


def _is_stack(model: Model, written: Written) -> bool:
    path, number = written.parts[0]
    return number is None and len(model.declared[path].shape) == 3 and model.is_matrix(path)


def other_dtype(model: Model) -> np.dtype:
    """The dtype of what is not quantized: that of the source's floats, or bfloat16 for files that mix dtypes."""
    matrices = {
        part.values.dtype
        for name, source in model.sources.items()
        if len(model.declared[name].shape) > 1
        for part in source.parts
        if isinstance(part, Dense)
    }
    only = matrices.pop() if len(matrices) == 1 else None
    return only if only is not None and model.checkpoint.dialect == HUGGING_FACE else DTYPES["bfloat16"]


def _tensors(
    writer: Writer, written: Written, how: Export, dtype: np.dtype, left_out: list[str], groups: dict[str, int]
) -> list[Tensor]:
    values = Values(writer.model, written)
    module, _, kind = written.name.rpartition(".")
    module = module if kind == "weight" else written.name
    type, why = _choice(writer, written, values, how)
    made = _made(writer.model, written)
    if type is None and made is None:
        if len(values.shape) > 1 and kind != "bias":
            writer.note(written, dense_shapes(values, dtype), why)
            if how.name not in DTYPES:
                left_out.append(module)
        exact = "correction_bias" in written.name  # rounding it changes which experts are chosen
        return [writer.plain(written.name, values, PLAIN["F32"] if exact else dtype)]
    sizes = planned(how, module, values.shape)
    importance = writer.importance(written, values)

    def compute() -> Mapping[str, np.ndarray]:
        if made is not None:
            return how.tensors(module, made)
        assert type is not None
        with on_host(), located(written.name):
            matrices = [values.matrix(i) for i in range(values.count)]
            whole = matrices[0] if len(values.shape) == 2 else jnp.stack(matrices)
            return how.tensors(module, encoded(whole, type, importance if type.uses_importance else None))

    result = how.takes(values.shape) if made is None else made
    groups |= {module: result.group} if hasattr(result, "group") else {}
    writer.note(written, result, why)
    return together(writer.pool, sizes, compute)


def _made(model: Model, written: Written) -> Weight | None:
    """What calibration made of a tensor; None: nothing."""
    if any(path not in model.made for path, _ in written.parts):
        return None
    parts = [
        model.made[path] if number is None else jax.tree.map(lambda leaf, n=number: leaf[n], model.made[path])
        for path, number in written.parts
    ]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts) if len(parts) > 1 else parts[0]
    return joined if written.rows is None else joined.arrange(rows=written.rows)


def _choice(writer: Writer, written: Written, values: Values, how: Export) -> tuple[Encoding | None, str]:
    """The type of a tensor, or why it stays plain."""
    path = written.parts[0][0]
    if not writer.model.is_matrix(path) or how.name in DTYPES:
        return None, f"as {how.name}"
    if written.transposed and how.name != "mxfp4_experts":
        return None, f"a stack of transposed matrices, which {how.name} has no form for"
    if how.container != "mlx" and path in SENSITIVE:
        return None, "embeddings and heads stay plain in such directories"
    if path in writer.model.made:
        return None, "calibrated"
    type, why = writer.choice(written, values)
    if path in SENSITIVE and type is not None and how.encoding in ENCODINGS:
        type = fitting(ENCODINGS[how.encoding], values.shape[-1])
        why = "general type" if type.name == how.encoding else why
    if type is None or type.name != how.encoding:
        return None, why
    try:
        planned(how, "matrix", values.shape)
    except InputError as error:
        return None, str(error)
    return type, why
