"""Which model a checkpoint is of: its configuration, its rules, its tokenizer, whatever kind of file it came in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from jaxllm.checkpoint.ggml import GGMLFile, is_ggml, open_ggml
from jaxllm.checkpoint.gguf import GGUFFile, open_gguf
from jaxllm.checkpoint.rules import Rule
from jaxllm.checkpoint.safetensors import HFDirectory, open_directory
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.models.llama import Llama
from jaxllm.models.llama_config import GGUF_ARCHITECTURES, MODEL_TYPES, LlamaConfig
from jaxllm.models.llama_names import GGUF_IGNORED, HF_IGNORED, HF_RULES, gguf_rules
from jaxllm.tokenizer import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that nothing but the headers of has been read.

    model: makes the model, given its config, a mesh, and the block of its ROW matrices.
    sampling: what generation_config.json asks for, by the names of `LanguageModel.generate`.
    """

    name: str
    config: LlamaConfig
    model: Callable[[LlamaConfig, Mesh, int], nnx.Module]
    tensors: Mapping[str, Weight]
    rules: Sequence[Rule]
    ignored: Sequence[str]
    tokenizer: Tokenizer | None
    sampling: Mapping[str, float] = field(default_factory=dict)


def open_checkpoint(path: Path, gqa: int = 1) -> Checkpoint:
    """Open a GGUF file, one of the older GGML files, or a Hugging Face directory.

    Args:
        gqa: query heads to a key/value head, which GGML files do not say.

    Raises:
        InputError: it cannot be read, or is of a model that is not supported.
    """
    if path.is_dir():
        read, opened = _from_directory, open_directory(path)
    elif is_ggml(path):
        read, opened = _from_gguf, open_ggml(path, gqa)
    else:
        read, opened = _from_gguf, open_gguf(path)
    try:
        return read(opened)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _from_gguf(file: GGUFFile | GGMLFile) -> Checkpoint:
    _supported("architecture", file.architecture, GGUF_ARCHITECTURES)
    config = LlamaConfig.from_gguf(file.metadata, file.tensors)
    tokenizer = Tokenizer.from_gguf(file.metadata) if "tokenizer.ggml.model" in file.metadata else None
    return Checkpoint(file.path.name, config, Llama, file.tensors, gguf_rules(config), GGUF_IGNORED, tokenizer)


def _from_directory(folder: HFDirectory) -> Checkpoint:
    _supported("model_type", folder.config["model_type"], MODEL_TYPES)
    config = LlamaConfig.from_hf(folder.config)
    generation = folder.json("generation_config.json")
    tokenizer = None
    if (folder.path / "tokenizer.json").is_file():
        eos = generation.get("eos_token_id", folder.config.get("eos_token_id"))
        tokenizer = Tokenizer.from_directory(folder.path, folder.json("tokenizer_config.json"), eos)
    sampling = {}
    if generation.get("do_sample"):
        sampling = {"temperature": 1.0} | {k: generation[k] for k in SAMPLING if generation.get(k) is not None}
    return Checkpoint(
        folder.path.resolve().name, config, Llama, folder.tensors, HF_RULES, HF_IGNORED, tokenizer, sampling
    )


def _supported(what: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{what} '{value}' is not supported; supported: {', '.join(known)}")
