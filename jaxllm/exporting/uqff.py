"""A model as a folder of UQFF, as mistral.rs reads it.

Matrices are layers, each in a type of its own; whatever stays plain is in residual.safetensors. Version 0.2 has no
names: layers are in mistral.rs's order, see `uqff_legacy`; embeddings are no layers there, and tied heads are.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoint import exports_uqff_legacy as legacy
from jaxllm.checkpoint import uqff as reading
from jaxllm.checkpoint.computed import together
from jaxllm.checkpoint.exports_integers import Laid
from jaxllm.checkpoint.exports_uqff import kind, lay
from jaxllm.checkpoint.repack import derived
from jaxllm.checkpoint.uqff_legacy import HEAD, place
from jaxllm.checkpoint.writing import Advance, Tensor, safetensors_file, shards, write_files
from jaxllm.encodings import Encoding, encoding
from jaxllm.errors import InputError, located
from jaxllm.exporting.directory import hugging_face, other_dtype, stacked
from jaxllm.exporting.model import Model, Values
from jaxllm.exporting.writer import PLAIN, Output, Writer
from jaxllm.formats import hqq
from jaxllm.formats.base import Weight
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.models.describe import tensors_of
from jaxllm.models.family import HUGGING_FACE
from jaxllm.models.rule import Written
from jaxllm.placing import DerivedArray
from jaxllm.recipe import Plan, Recipe
from jaxllm.requantize import encoded, on_host, planned

VERSIONS = ("1.2", "0.2")
PRODUCER = "jaxllm"
ROUTER = ".block_sparse_moe.gate.weight"  # Mixtral's, a layer of version 0.2
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class _Layer:
    """A matrix, or a stack of them, that becomes a layer.

    made: the weight, of shapes.
    why: why in this type.
    type: what it is encoded in; None: it has GGML's blocks already.
    read_as: the sizes that a matrix is encoded in; HQQ's groups run across rows.
    """

    module: str
    values: Values
    made: Weight
    why: str
    type: Encoding | None
    importance: np.ndarray | None = None
    read_as: tuple[int, ...] = ()

    def weight(self) -> Weight:
        """Encoded matrix by matrix: floats of only one of them are in memory."""
        parts = []
        for i in range(self.values.count):
            if self.type is None:
                parts.append(self.made.with_leaves({"blocks": self.values.blocks(i)}))
                continue
            own = self.importance if self.importance is None or self.importance.ndim == 1 else self.importance[i]
            with on_host(), located(self.module):
                floats = self.values.matrix(i).reshape(self.read_as)
                one = encoded(floats, self.type, own if self.type.uses_importance else None)
            parts.append(jax.tree.map(np.asarray, one))
        return parts[0] if len(self.values.shape) == 2 else jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

    def laid(self, weight: Weight) -> Laid:
        """The tensors of a weight like `made`."""
        with located(self.module):
            return lay(weight, self.values.shape)


def uqff(
    model: Model,
    recipe: Recipe,
    version: str,
    path: Path,
    others: Mapping[str, Path | bytes],
    limit: int,
    source: str,
    pool: ThreadPoolExecutor,
) -> Output:
    """The model as a folder of UQFF.

    Args:
        version: one of VERSIONS.
        others: the source's files that come along, without its configuration.
        limit: the size of a file.
        source: what it is made from, see `unfinished`.

    Raises:
        InputError: UQFF cannot hold this model.
    """
    writer, (entries, wanted, texts) = Writer(model, recipe, pool), hugging_face(model)
    if model.checkpoint.dialect == HUGGING_FACE:
        wanted = tensors_of(model.checkpoint.family.dialects[HUGGING_FACE], model.checkpoint.config, model.shapes)
    old, dtype = version != VERSIONS[0], other_dtype(model)
    wanted = _untied(wanted) if old else [_renamed(each) for each in stacked(wanted, "experts")]
    layers, rest = dict[str, _Layer](), list[Written]()
    for written in wanted:
        values = Values(model, written)
        layer = None if old and written.name == EMBEDDING else _layer(writer, written, values, dtype)
        if old and written.name.endswith(ROUTER):
            module, type = written.name.removesuffix(".weight"), encoding(dtype.name)
            layer = _Layer(module, values, planned(values.shape, type), "a router", type, None, values.shape)
        if layer is None:
            rest.append(written)
        else:
            layers[written.name.removesuffix(".weight")] = layer
            writer.note(written, layer.made, layer.why)
    biases = {each.name.removesuffix(".bias"): each for each in rest if each.name.removesuffix(".bias") in layers}
    plain = [_plain(writer, each, dtype) for each in rest if each not in biases.values()]
    name = "mixed" if recipe.type is None else recipe.type.name.replace("_k", "k")
    if old:
        parts = [_numbered(writer, layers, biases, dtype)]
        metadata = dict[str, str]()
    else:
        tensors = [_scalar(f"{reading.VERSION}.{key}", n) for key, n in _version().items()]
        for module, layer in layers.items():
            tensors += _named(pool, layer)
            if module in biases:
                tensors.append(_plain(writer, biases[module], _of_bias(layer, dtype)))
        parts = shards(tensors, limit)
        metadata = {"uqff.producer": PRODUCER, "uqff.version": ".".join(map(str, _version().values()))}
    names = [f"{name}-{i}.uqff" for i in range(len(parts))]
    key = "dtype" if "dtype" in entries else "torch_dtype"
    files = {**others, **texts, "config.json": _json(entries | {key: dtype.name})}
    files |= {} if old else {reading.REPORT: _json(_report(name, names, layers, metadata["uqff.version"]))}
    made = [safetensors_file(n, part, metadata) for n, part in zip(names, parts, strict=True)]
    made.append(safetensors_file(reading.RESIDUAL, plain, metadata))

    def write(advance: Advance, checksums: bool) -> None:
        write_files(path, made, files, advance, source=source, checksums=checksums)

    return Output(Plan(writer.rows), [tensor for part in (*parts, plain) for tensor in part], write)


def _renamed(written: Written) -> Written:
    """GPT-OSS's stacks as UQFF has them: named like other matrices, and as `[experts, out, in]`."""
    stem, _, end = written.name.rpartition("_proj")
    if ".experts." not in written.name or end not in ("", "_bias"):
        return written
    return replace(written, name=f"{stem}_proj.{'bias' if end else 'weight'}", transposed=False)


def _untied(wanted: Iterable[Written]) -> list[Written]:
    """Also the head, which is a layer of version 0.2 even if it is the embedding."""
    named = {written.name: written for written in wanted}
    if any(".experts." in name and not name.split(".experts.")[1][0].isdecimal() for name in named):
        raise InputError("UQFF 0.2 has no place for such stacks of experts; version 1.2 does")
    named.setdefault(HEAD, replace(named[EMBEDDING], name=HEAD))
    return list(named.values())


def _layer(writer: Writer, written: Written, values: Values, dtype: np.dtype) -> _Layer | None:
    """The layer that a tensor becomes; None: it stays plain."""
    type, why = writer.choice(written, values)
    if type is None:
        return None
    module, (*lead, out, in_) = written.name.removesuffix(".weight"), values.shape
    if values.is_in(blocks := type.name.upper()):
        size, nbytes = BLOCK_TYPES[blocks][:2]
        own = jax.ShapeDtypeStruct((*lead, out, in_ // size, nbytes), np.uint8)
        return _Layer(module, values, GGML(own, blocks), f"{why}; already in it", None)
    read_as: tuple[int, ...] = (out, in_)
    if type.name.startswith("hqq"):
        read_as = (hqq.GROUP, out * in_ // hqq.GROUP)
        if out * in_ % hqq.GROUP or read_as[1] % type.block:
            type, read_as, why = encoding("f16"), (out, in_), f"{why}; {[out, in_]} are not whole blocks of {type.name}"
    if type.name == "f16":  # nothing else fits; mistral.rs wants the model's own dtype
        type = encoding(dtype.name)
    made = planned((*lead, *read_as), type)
    with located(module):
        kind(made)
    return _Layer(module, values, made, why, type, writer.importance(written, values), read_as)


def _plain(writer: Writer, written: Written, dtype: np.dtype) -> Tensor:
    exact = "correction_bias" in written.name  # rounding it changes which experts are chosen
    return writer.plain(written.name, Values(writer.model, written), PLAIN["F32"] if exact else dtype)


def _of_bias(layer: _Layer, dtype: np.dtype) -> np.dtype:
    """The dtype of its bias, as mistral.rs has it."""
    return PLAIN["F32"] if isinstance(layer.made, GGML) or len(layer.values.shape) > 2 else dtype


def _named(pool: ThreadPoolExecutor, layer: _Layer) -> list[Tensor]:
    """The tensors of a layer in version 1.2."""

    def compute() -> dict[str, np.ndarray]:
        return {layer.module + end: array.read() for end, array in layer.laid(layer.weight()).items()}

    return together(pool, {layer.module + end: array for end, array in layer.laid(layer.made).items()}, compute)


def _numbered(
    writer: Writer, layers: Mapping[str, _Layer], biases: Mapping[str, Written], dtype: np.dtype
) -> list[Tensor]:
    """The layers of version 0.2."""
    tensors = []
    for number, module in enumerate(sorted(layers, key=lambda module: place(f"{module}.weight"))):
        layer, bias = layers[module], biases.get(module)
        code, values = kind(layer.made).code, None if bias is None else Values(writer.model, bias)
        kept = _of_bias(layer, dtype)

        def array(laid: Laid, code: int = code, values: Values | None = values, kept: np.dtype = kept) -> DerivedArray:
            own = None if values is None else derived(values.stored, kept, partial(values.plain, 0, kept))
            return legacy.layer(laid, code, own)

        def compute(n: str = str(number), layer: _Layer = layer, array: Any = array) -> dict[str, np.ndarray]:
            return {n: array(layer.laid(layer.weight())).read()}

        tensors += together(writer.pool, {str(number): array(layer.laid(layer.made))}, compute)
    return tensors


def _scalar(name: str, value: int) -> Tensor:
    array = np.array(value, np.uint32)
    return Tensor(name, array.dtype, (), [array])


def _version() -> dict[str, int]:
    return {"major": reading.MAJOR, "minor": reading.MINOR, "patch": reading.PATCH}


def _report(name: str, names: Sequence[str], layers: Mapping[str, _Layer], version: str) -> dict[str, Any]:
    """uqff_report.json: which type each layer has."""
    types = {module: kind(layer.made).name for module, layer in layers.items()}
    details, fallbacks = [], []
    for module, layer in layers.items():
        said = {"module": module, "shape": [*layer.values.shape]}
        details.append(said | {"default_target": name, "resolved_target": types[module], "stored": types[module]})
        if "whole blocks" in layer.why:
            fallbacks.append(said | {"from": name, "to": types[module], "reason": layer.why})
    output = {"quant": name, "shards": [*names], "layers": len(layers), "actual_counts": dict(Counter(types.values()))}
    output |= {"fallback_count": len(fallbacks), "fallbacks": fallbacks, "layer_details": details}
    return {"schema": 1, "generated_by": {"tool": PRODUCER}, "uqff_version": version, "outputs": [output]}


def _json(said: Mapping[str, Any]) -> bytes:
    return (json.dumps(said, indent=2) + "\n").encode()
