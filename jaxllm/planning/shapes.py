"""Models whose parameters are shapes: `ShapeDtypeStruct`s with shardings, laid out by the code that loads real ones."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm.checkpoint import filling, matching
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.declaration import Declaration
from jaxllm.device_memory import device_bytes
from jaxllm.encodings import ENCODINGS
from jaxllm.entries import read_json
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.initializing import PRESETS, described
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.loading import find_checkpoint
from jaxllm.models.family import Family
from jaxllm.placing import Source, layout
from jaxllm.recipe import SENSITIVE, Recipe, is_in, recipe
from jaxllm.requantize import planned

Format = Callable[[str, tuple[int, ...]], Weight]

WEIGHTS = (".safetensors", ".uqff", ".gguf")  # files in a directory that has more than config.json


def dense(dtype: jax.typing.DTypeLike) -> Format:
    """The format where every matrix is unquantized, in one dtype."""
    return lambda name, shape: Dense(jax.ShapeDtypeStruct(shape, dtype))


def deepseek_fp8(activations: Activations | None = None, block: tuple[int, int] = (128, 128)) -> Format:
    """DeepSeek-V3's published format: FP8 in blocks of 128 x 128; embedding, head and routers are bfloat16.

    Args:
        activations: how those that meet an FP8 matrix are rounded; None: they are not.
        block: rows and columns that share a scale.
    """

    def format(name: str, shape: tuple[int, ...]) -> Weight:
        if name in SENSITIVE or name.endswith("mlp.gate.weight"):
            return dense(jnp.bfloat16)(name, shape)
        *stack, out, in_ = shape
        scales = jax.ShapeDtypeStruct((*stack, -(-out // block[0]), -(-in_ // block[1])), jnp.float32)
        return Scaled(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), scales, block, activations)

    return format


def mxfp4_experts(name: str, shape: tuple[int, ...]) -> Weight:
    """GPT-OSS's published format: experts in MXFP4, the rest in bfloat16."""
    if re.search(r"experts\.(gate|up|down)_proj$", name):
        return planned(shape, ENCODINGS["mxfp4"])
    return dense(jnp.bfloat16)(name, shape)


def fill_with_shapes(
    model: nnx.Module, mesh: Mesh, format: Format, dtype: jax.typing.DTypeLike | None = None
) -> dict[str, int]:
    """Replace every Declaration by shapes; returns the bytes of each parameter on one device.

    Args:
        model: one whose parameters are declared and not loaded.
        mesh: the mesh that it was made for.
        format: given a parameter's path and its logical shape in the checkpoint, its weight, made of shapes. Vectors
            are always float32.
        dtype: of the activations, by which kernels and so the layout of weights are chosen; None: weights as read.
    """
    return fill(model, mesh, lambda name, declared: Source(name, (format(name, declared.shape),)), dtype)


def fill(
    model: nnx.Module,
    mesh: Mesh,
    source: Callable[[str, Declaration], Source],
    dtype: jax.typing.DTypeLike | None = None,
) -> dict[str, int]:
    """Replace every Declaration by shapes; returns the bytes of each parameter on one device.

    Args:
        source: given the path of a matrix and its declaration, what it is made of. Vectors are always float32.
        dtype: of the activations, by which kernels and so the layout of weights are chosen; None: weights as read.
    """
    sizes = {}
    for name, param in parameters(model).items():
        declared = param.get_value()
        vector = len(declared.shape) == 1
        given = Source(name, (dense(jnp.float32)(name, declared.shape),)) if vector else source(name, declared)
        weight = layout(given, declared, mesh).weight
        if not vector and not declared.keep and dtype is not None:
            weight = filling.in_kernels_layout(weight, NamedSharding(mesh, declared.spec), dtype)
        param.set_value(weight.leaf("values") if vector else weight)
        sizes[name] = device_bytes(weight)
    return sizes


@dataclass(frozen=True)
class Described:
    """A model to plan.

    Attributes:
        sources: given a model with declared parameters, what each of them is made of.
        recipe: what its matrices are encoded in; None: they stay as they are.
    """

    name: str
    family: Family
    config: Any
    sources: Callable[[Decoder], Mapping[str, Source]]
    recipe: Recipe | None

    def quantized(self, type: str | int) -> "Described":
        """The same model with its matrices encoded as `type`. Raises InputError if there is no such type."""
        chosen = recipe(type)
        assert chosen is not None and chosen.type is not None
        # Sizes do not depend on which inputs matter.
        return replace(self, recipe=replace(chosen, type=replace(chosen.type, needs_importance=False)))

    def placed(self, mesh: Mesh, dtype: jax.typing.DTypeLike) -> tuple[Decoder, dict[str, int]]:
        """The model as `load` would place it on the mesh, made of shapes; and each parameter's bytes on a device."""
        with located(self.name):
            sketch = self.family.model(self.config, mesh, 1)
            sources = self.sources(sketch)

            def encoded(name: str, source: Source) -> Source:
                chosen = self.recipe and self.recipe.choose(name, source.name, source.shape).type
                if not chosen or is_in(source.parts[0], chosen):
                    return source
                return Source(source.name, (planned(source.shape, chosen),))

            declared = parameters(sketch)
            block = matching.row_block(declared, sources, lambda name, source: encoded(name, source).parts[0], mesh)
            model = self.family.model(self.config, mesh, block)

            def source_of(name: str, declared: Declaration) -> Source:
                return sources[name] if declared.keep else encoded(name, sources[name])

            return model, fill(model, mesh, source_of, dtype)


def describe(model: str) -> Described:
    """The model that a text names: a preset, a file or directory, or the id of a model on the hub. Of directories that
    have no weights, and of the hub, config.json is read alone.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    if model in PRESETS:
        return _published(model, model, PRESETS[model])
    path = Path(model)
    if not path.exists() and model != "demo":
        return _published(model, str(config := _config_from_hub(model)), read_json(config))
    if path.is_dir() and not any(file.suffix in WEIGHTS for file in path.iterdir()):
        path /= "config.json"
    if path.suffix == ".json":
        return _published(path.resolve().parent.name, str(path), read_json(path))
    file = find_checkpoint(model)
    opened = open_checkpoint(file)
    return Described(
        opened.name,
        opened.family,
        opened.config,
        lambda sketch: matching.match(sketch, opened.tensors, opened.rules, opened.ignored),
        None,
    )


def _config_from_hub(model: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InputError(f"{model}: no such file, and no preset; those are {', '.join(PRESETS)}")
    try:
        return Path(huggingface_hub.hf_hub_download(model, "config.json"))
    except (OSError, ValueError) as error:  # what the hub client and the network raise derives from these
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{model}: no such file or preset, and not to be had from the hub: {reason}") from error


def _published(name: str, config: str, description: Mapping[str, object]) -> Described:
    """A model of which only the description is known, in the format that the description declares."""
    checkpoint = described(config)
    with located(name):
        format = _declared_format(description)

    def sources(sketch: Decoder) -> dict[str, Source]:
        shapes = {path: param.get_value().shape for path, param in parameters(sketch).items()}
        vector = dense(jnp.float32)
        return {path: Source(path, ((format if len(s) > 1 else vector)(path, s),)) for path, s in shapes.items()}

    return Described(name, checkpoint.family, checkpoint.config, sources, None)


def _declared_format(description: Mapping[str, Any]) -> Format:
    """What matrices of a config.json, or of ModelArgs of DeepSeek's demo, are held in; bfloat16 unless they say."""
    if description.get("dtype") == "fp8":
        return deepseek_fp8()
    given = description.get("quantization_config")
    if not given:
        return dense(jnp.bfloat16)
    if given.get("quant_method") == "mxfp4":
        return mxfp4_experts
    if given.get("quant_method") == "fp8" and "weight_block_size" in given:
        return deepseek_fp8(block=tuple(given["weight_block_size"]))
    raise InputError(
        f"its quantization '{given.get('quant_method')}' cannot be planned from config.json alone: give a directory "
        "that has the weights too"
    )
