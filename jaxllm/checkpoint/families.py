"""Which model a checkpoint is of: its configuration, its rules, its tokenizer, whatever kind of file it came in."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flax import nnx

from jaxllm.checkpoint.demo import DemoDirectory, demo_config, is_demo, open_demo
from jaxllm.checkpoint.ggml import GGMLFile, is_ggml, open_ggml
from jaxllm.checkpoint.gguf import GGUFFile, open_gguf
from jaxllm.checkpoint.quantized import assemble
from jaxllm.checkpoint.rules import Rule
from jaxllm.checkpoint.safetensors import Entries, HFDirectory, open_directory
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.models import deepseek_config, deepseek_names, gpt_oss_config, gpt_oss_names, llama_config, llama_names
from jaxllm.models.deepseek import deepseek
from jaxllm.models.deepseek_config import DeepseekConfig
from jaxllm.models.gpt_oss import gpt_oss
from jaxllm.models.gpt_oss_config import GptOssConfig
from jaxllm.models.llama import llama
from jaxllm.models.llama_config import LlamaConfig
from jaxllm.sampling import Sampler
from jaxllm.tokenizer import Tokenizer

Config = LlamaConfig | DeepseekConfig | GptOssConfig

FAMILIES = llama_config, deepseek_config, gpt_oss_config
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that nothing but the headers of has been read.

    model: makes the model, given its config, a mesh, and the block of its ROW matrices.
    sampling: what generation_config.json asks for, by the names of `LanguageModel.generate`.
    """

    name: str
    config: Config
    model: Callable[..., nnx.Module]
    tensors: Mapping[str, Weight]
    rules: Sequence[Rule]
    ignored: Sequence[str]
    tokenizer: Tokenizer | None
    sampling: Mapping[str, float] = field(default_factory=dict)


def open_checkpoint(path: Path, gqa: int = 1, config: Path | None = None) -> Checkpoint:
    """Open a GGUF file, one of the older GGML files, a Hugging Face directory, or one of DeepSeek's demo.

    Args:
        gqa: query heads to a key/value head, which GGML files do not say.
        config: the demo's ModelArgs, if it is not in the directory.

    Raises:
        InputError: it cannot be read, or is of a model that is not supported.
    """
    if is_demo(path):
        read, opened = _from_demo, open_demo(path, config)
    elif config is not None:
        raise InputError(f"config '{config}': only files of DeepSeek's demo (model*-mp*.safetensors) are read with one")
    elif path.is_dir():
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
    kind = file.architecture
    _supported("architecture", kind, [name for family in FAMILIES for name in family.GGUF_ARCHITECTURES])
    if kind in deepseek_config.GGUF_ARCHITECTURES:
        config = DeepseekConfig.from_gguf(file.metadata, file.tensors)
        model, rules, ignored = deepseek, deepseek_names.GGUF_RULES, deepseek_names.gguf_ignored(config)
    elif kind in gpt_oss_config.GGUF_ARCHITECTURES:
        config = GptOssConfig.from_gguf(file.metadata, file.tensors)
        model, rules, ignored = gpt_oss, gpt_oss_names.GGUF_RULES, ()
    else:
        config = LlamaConfig.from_gguf(file.metadata, file.tensors)
        model, rules, ignored = llama, llama_names.gguf_rules(config), llama_names.GGUF_IGNORED
    tokenizer = Tokenizer.from_gguf(file.metadata) if "tokenizer.ggml.model" in file.metadata else None
    return Checkpoint(file.path.name, config, model, file.tensors, rules, ignored, tokenizer)


def _from_directory(folder: HFDirectory) -> Checkpoint:
    kind, tensors = folder.config["model_type"], assemble(folder)
    _supported("model_type", kind, [name for family in FAMILIES for name in family.MODEL_TYPES])
    if kind in deepseek_config.MODEL_TYPES:
        config = DeepseekConfig.from_hf(folder.config, tensors)
        model, rules, ignored = deepseek, deepseek_names.HF_RULES, deepseek_names.hf_ignored(config)
    elif kind in gpt_oss_config.MODEL_TYPES:
        config = GptOssConfig.from_hf(folder.config)
        model, rules, ignored = gpt_oss, gpt_oss_names.HF_RULES, llama_names.HF_IGNORED
    else:
        config = LlamaConfig.from_hf(folder.config).with_biases(tensors)
        model, rules, ignored = llama, llama_names.HF_RULES, llama_names.HF_IGNORED
    if "lm_head.weight" in tensors:  # as in transformers, where a head that is there counts more than being tied
        config = replace(config, tie_word_embeddings=False)
    return _with_texts(folder, config, model, tensors, rules, ignored)


def _from_demo(folder: DemoDirectory) -> Checkpoint:
    tensors = folder.weights()
    return _with_texts(folder, demo_config(folder.config, tensors), deepseek, tensors, deepseek_names.DEMO_RULES, ())


def _with_texts(
    folder: HFDirectory,
    config: Config,
    model: Callable[..., nnx.Module],
    tensors: Mapping[str, Weight],
    rules: Sequence[Rule],
    ignored: Sequence[str],
) -> Checkpoint:
    """The checkpoint with what the directory says of texts: its tokenizer, and how to draw answers."""
    generation = folder.json("generation_config.json")
    tokenizer = None
    if (folder.path / "tokenizer.json").is_file():
        eos = _eos(generation if "eos_token_id" in generation else Entries(folder.config, "config.json"))
        tokenizer = Tokenizer.from_directory(folder.path, folder.json("tokenizer_config.json").values, eos)
    sampling = _sampling(generation)
    return Checkpoint(folder.path.resolve().name, config, model, tensors, rules, ignored, tokenizer, sampling)


def _eos(entries: Entries) -> list[int]:
    def listed(value: object) -> list:
        return value if isinstance(value, list) else [value]

    def good(value: object) -> bool:
        return all(type(token) is int and -1 <= token < 2**31 for token in listed(value))

    tokens = listed(entries.get("eos_token_id", [], good, "a token id or a list of them"))
    return [token for token in tokens if token >= 0]  # some write -1 for "there is none"


def _sampling(generation: Entries) -> dict[str, float]:
    """What answers are drawn with; what transformers takes for "not done" (top_k 0, min_p 0) is left out."""
    if not generation.flag("do_sample"):
        return {}
    given = {key: generation.number(key, above=-math.inf) for key in SAMPLING if key in generation}
    given = {"temperature": 1.0} | {k: v for k, v in given.items() if v or k not in ("top_k", "min_p")}
    try:
        Sampler.of(**given)
    except InputError as error:
        raise InputError(f"{generation.where}: {error}") from error
    return given


def _supported(what: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{what} {value!r} is not supported; supported: {', '.join(known)}")
