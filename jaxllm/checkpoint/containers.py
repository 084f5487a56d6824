"""The kinds of files that checkpoints come in. Each says how it is recognised and opened; the first match is used.

Every kind opens to the same thing: a description in some dialect, tensors as weights, and texts. The families of models
interpret the description.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.demo import is_demo, open_demo
from jaxllm.checkpoint.ggml import GGMLFile, is_ggml, open_ggml
from jaxllm.checkpoint.gguf import GGUFFile, open_gguf
from jaxllm.checkpoint.quantized import assemble
from jaxllm.checkpoint.safetensors import open_directory
from jaxllm.checkpoint.texts import Texts, read_texts
from jaxllm.checkpoint.uqff import LAYOUT, RESIDUAL, in_half_split_order, is_uqff, read_folder, weights_of
from jaxllm.checkpoint.uqff_legacy import is_legacy, legacy_weights
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.models.deepseek.config import DEMO_TYPE
from jaxllm.models.family import DEEPSEEK_DEMO, GGUF, HUGGING_FACE
from jaxllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """An opened checkpoint, of which only headers have been read.

    Attributes:
        dialect, kind: the dialect of its description, and its name for the architecture; see `models.family`.
        description: config.json, GGUF metadata, or the demo's ModelArgs.
        tensors: by the file's own names, with the tensors of each quantized matrix joined.
        max_batch_size: how many prompts are answered together; None: the checkpoint does not say.
    """

    name: str
    dialect: str
    kind: str
    description: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    texts: Texts = field(default_factory=Texts)
    max_batch_size: int | None = None


@dataclass(frozen=True)
class Container:
    """A kind of file or directory.

    Attributes:
        name: its common name.
        detects: whether a path is of this kind.
        opens: opens a path, given those of `options` that the user set.
        options: the options that it takes besides the path.
    """

    name: str
    detects: Callable[[Path], bool]
    opens: Callable[..., Opened]
    options: frozenset[str] = frozenset()


def open_container(path: Path, options: Mapping[str, object]) -> Opened:
    """Detect the kind of a path and open it.

    Raises:
        InputError: it cannot be read, or its kind does not have one of the options.
    """
    container = next(c for c in CONTAINERS if c.detects(path))
    for option, value in options.items():
        if option not in container.options:
            takers = ", ".join(c.name for c in CONTAINERS if option in c.options)
            raise InputError(f"{option} '{value}' means nothing for {container.name}, only for {takers}")
    return container.opens(path, **options)


def _open_demo(path: Path, config: Path | None = None) -> Opened:
    args, tensors = open_demo(path, config)
    name, texts = path.resolve().name, read_texts(path, args)
    return Opened(name, DEEPSEEK_DEMO, DEMO_TYPE, args, tensors, texts, args["max_batch_size"])


def _open_directory(path: Path) -> Opened:
    if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise InputError(f"a directory of GGUF files: name one of them, such as {files[0].name}")
    folder = open_directory(path)
    texts, kind = read_texts(path, folder.config), str(folder.config["model_type"])
    return Opened(path.resolve().name, HUGGING_FACE, kind, folder.config, assemble(folder), texts)


def _open_uqff(path: Path) -> Opened:
    folder, arrays = read_folder(path)
    weights = legacy_weights(folder, arrays) if is_legacy(arrays) else weights_of(arrays)
    if twice := weights.keys() & folder.tensors.keys():
        raise InputError(f"tensor '{min(twice)}' is in {RESIDUAL} too")
    tensors = {**folder.tensors, **in_half_split_order(folder.config, weights)}
    config = {key: value for key, value in folder.config.items() if key != LAYOUT}
    texts = read_texts(folder.path, config)
    return Opened(path.resolve().name, HUGGING_FACE, str(config["model_type"]), config, tensors, texts)


def _open_ggml(path: Path, gqa: int = 1) -> Opened:
    return _as_gguf(open_ggml(path, gqa))


def _open_gguf(path: Path) -> Opened:
    return _as_gguf(open_gguf(path))


def _as_gguf(file: GGUFFile | GGMLFile) -> Opened:
    has_tokenizer = file.metadata.get("tokenizer.ggml.model", "none") != "none"
    tokenizer = Tokenizer.from_gguf(file.metadata) if has_tokenizer else None
    eos = frozenset() if tokenizer is None else tokenizer.eos_ids
    texts = Texts(tokenizer, eos)
    return Opened(file.path.name, GGUF, file.architecture, file.metadata, file.tensors, texts)


CONTAINERS: list[Container] = [
    Container("files of DeepSeek's demo (model*-mp*.safetensors)", is_demo, _open_demo, frozenset({"config"})),
    Container("UQFF", is_uqff, _open_uqff),
    Container("a Hugging Face directory", Path.is_dir, _open_directory),
    Container("a GGML file from before GGUF", is_ggml, _open_ggml, frozenset({"gqa"})),
    Container("a GGUF file", lambda path: True, _open_gguf),  # last: anything unrecognised is refused as a GGUF file
]
