"""`initialize`: a model with random weights, from its configuration alone.

It shows what a model needs and how fast it runs before its checkpoint is available. Random numbers replace a
checkpoint's tensors; everything after that is the same as in `load`. Each number is a hash of its position in the
matrix, as in counter-based random generators. So a device's part of a matrix is made without the rest, and the numbers
are the same on any mesh. JAX's own generator makes complete arrays: these can be sharded in the checkpoint's order, but
not in the order in which heads and padding place the rows.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.checkpoint.opening import Checkpoint
from jaxllm.checkpoint.texts import Texts
from jaxllm.entries import Entries, read_json
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.language_model import LanguageModel
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.parameter import parameters
from jaxllm.loading import Settings, build
from jaxllm.models.deepseek.config import DEMO_TYPE, demo_args
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import DEEPSEEK_DEMO, HUGGING_FACE, family_of, model_arguments
from jaxllm.models.rule import Rule
from jaxllm.recipe import recipe

PRESETS: dict[str, Mapping[str, object]] = {
    name: description for family in FAMILIES for name, description in family.presets.items()
}

CHUNK = 2**18  # numbers computed at once, which fit into a processor's cache

# Tensors have the names of parameters; a stack has one tensor per matrix.
_RULES = (Rule(r"([^\[]+)\[(?P<expert>\d+)\]", r"\1"), Rule(r"([^\[]+)", r"\1"))


def initialize(
    config: object,
    *,
    mesh: Mesh | str | None = None,
    seed: int = 0,
    quantize: str | int | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    attention: str | None = None,
    progress: bool = True,
) -> LanguageModel:
    """A model with random weights, sharded while it is made. It has no tokenizer: prompts are lists of token ids.

    Matrices are uniform with mean 0 and variance 1 / (size of their input), rounded to `dtype`; norms are 1, biases and
    attention sinks 0. The same seed gives the same numbers on any mesh. What a config says of quantization is ignored.

    Args:
        config: a name in `jaxllm.PRESETS`, such as "gpt-oss-20b"; the content of a Hugging Face config.json or fields
            of ModelArgs of DeepSeek's demo, as a dict or the path of a JSON file (or of a directory with a
            config.json); or a configuration object, such as another model's `config`.
        quantize: a type such as "q4_k" that every matrix is encoded in.
        mesh, dtype, weights, max_seq_len, max_batch_size, attention, progress: see `load`. Matrices that are not
            quantized are held in `dtype`, unless `weights` says otherwise.

    Raises:
        InputError: a configuration or argument cannot be used; one line saying what and where.
    """
    if weights is None and quantize is None:
        weights = "packed"
    settings = Settings.of(mesh, recipe(quantize), dtype, weights, max_seq_len, max_batch_size, attention, progress)
    checkpoint = described(config)
    arguments = model_arguments(FAMILIES, checkpoint.family, settings.options)
    with located(checkpoint.name):
        sketch = checkpoint.family.model(checkpoint.config, settings.mesh, 1, **arguments)
        tensors = _tensors(sketch, seed, jnp.dtype(settings.dtype))
        return build(replace(checkpoint, tensors=tensors), settings)


def described(config: object) -> Checkpoint:
    """A checkpoint without tensors for the model that `config` describes, see `initialize`."""
    for family in FAMILIES:
        if isinstance(config, family.config):
            return Checkpoint(family.name, family, config, {}, _RULES, (), Texts())
    if isinstance(config, Mapping):
        return _from_entries("config", Entries(config, "config"))
    if not isinstance(config, str | os.PathLike):
        raise InputError(f"config is a {type(config).__name__}, not a name, path, dict or configuration of a model")
    if str(config) in PRESETS:
        return _from_entries(str(config), Entries(PRESETS[str(config)], str(config)))
    file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not file.exists():
        raise InputError(f"{config}: no such file, and no preset; those are {', '.join(PRESETS)}")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return _from_entries(name, Entries(read_json(file), str(file)))


def _from_entries(name: str, entries: Entries) -> Checkpoint:
    kind, dialect, batch = entries.values.get("model_type"), HUGGING_FACE, None
    with located(entries.where):
        if kind is None:
            kind, dialect, batch = DEMO_TYPE, DEEPSEEK_DEMO, demo_args(entries.values)["max_batch_size"]
        family = family_of(FAMILIES, dialect, str(kind))
        config: Any = family.dialects[dialect].config(entries.values, {})
    return Checkpoint(name, family, config, {}, _RULES, (), Texts(), batch)


def _tensors(model: nnx.Module, seed: int, dtype: np.dtype) -> dict[str, Weight]:
    """Initial values of each parameter by its name; a stack has one entry for each of its matrices."""
    norms = {
        id(module.weight): 1 - module.offset for _, module in nnx.iter_modules(model) if isinstance(module, RMSNorm)
    }
    tensors: dict[str, Weight] = {}
    for name, param in parameters(model).items():
        shape = param.get_value().shape
        if len(shape) == 1:
            tensors[name] = Dense(np.full(shape, norms.get(id(param), 0), np.float32))
        elif len(shape) == 2:
            tensors[name] = Dense(_random(name, shape, seed, dtype))
        else:
            biases = shape[-1] == 1
            for one in (f"{name}[{i}]" for i in range(shape[0])):
                tensors[one] = Dense(np.zeros(shape[1:], dtype) if biases else _random(one, shape[1:], seed, dtype))
    return tensors


def _random(name: str, shape: tuple[int, int], seed: int, dtype: np.dtype) -> "RandomMatrix":
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "<u4")
    rows, cols = (_mixed(np.arange(n, dtype=np.uint32) ^ key) for n, key in zip(shape, keys, strict=True))
    return RandomMatrix(rows, cols, math.sqrt(3 / shape[1]), dtype)


@dataclass(frozen=True)
class RandomMatrix:
    """A matrix of uniform random numbers, or some of its rows and columns, computed when it becomes an array.

    rows, cols: uint32, a hash for each row and each column.
    bound: the largest magnitude of the numbers.
    """

    rows: np.ndarray
    cols: np.ndarray
    bound: float
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.cols)

    @property
    def ndim(self) -> int:
        return 2

    def __getitem__(self, index: tuple[Any, ...]) -> "RandomMatrix":
        """Rows, or rows and columns; nothing is computed."""
        row, col = (*index, slice(None), slice(None))[:2]
        return replace(self, rows=self.rows[row], cols=self.cols[col])

    def take(self, positions: np.ndarray, axis: int) -> "RandomMatrix":
        return self[(slice(None),) * axis + (positions,)]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        out, step = np.empty(self.shape, dtype or self.dtype), max(1, CHUNK // max(1, len(self.cols)))
        for start in range(0, len(out), step):
            bits = _mixed(self.rows[start : start + step, None] + self.cols)
            out[start : start + step] = bits.view(np.int32).astype(np.float32) * np.float32(self.bound / 2**31)
        return out


def _mixed(x: np.ndarray) -> np.ndarray:
    """Hash each uint32 in place: the finalizer of MurmurHash3 (Appleby), where every bit depends on every input bit."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> 16
    return x
