"""Files of low-rank adapters (LoRA): a directory of PEFT or mlx-lm, or a GGUF file."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.adapter_pairs import AdapterFile, Pairs, low_rank, not_plain
from jaxllm.checkpoint.adapter_peft import read_peft
from jaxllm.checkpoint.gguf import open_gguf
from jaxllm.checkpoint.safetensors import read_header
from jaxllm.entries import Entries, read_json
from jaxllm.errors import InputError, located
from jaxllm.models.family import GGUF, HUGGING_FACE

CONFIG = "adapter_config.json"  # PEFT's and mlx-lm's


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter: a directory of PEFT or mlx-lm (safetensors only), or a GGUF file.

    Raises:
        InputError: there is none, or it is damaged, or of a kind that is more than LoRA.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such adapter")
    if path.is_dir():
        config = Entries(read_json(path / CONFIG), str(path / CONFIG))
        return read_peft(path, config) if "peft_type" in config else _read_mlx(path, config)
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise InputError(f"{path}: one file of an adapter: name its directory, which has {CONFIG} too")
    return _read_gguf(path)


def _read_mlx(path: Path, config: Entries) -> AdapterFile:
    """`mlx_lm/tuner/lora.py`: `[in, rank]` and `[rank, out]`; of a stack `[experts, rank, in]`, `[experts, out, rank]`;
    of a table `[vocabulary, rank]`, `[rank, hidden]`."""
    if (kind := config.text("fine_tune_type", "lora")) != "lora":
        raise InputError(f"{config.where}: 'fine_tune_type' is {kind[:64]!r}, not lora; fuse it with mlx_lm.fuse")
    values = config.get("lora_parameters", None, lambda value: isinstance(value, dict), "an object")
    parameters = Entries(values, f"{config.where}: lora_parameters")
    rank, scale = parameters.integer("rank"), parameters.number("scale", above=-np.inf)
    pairs, changes = Pairs[str](), {}
    with located(file := path / "adapters.safetensors"):
        for name, array in read_header(file).items():
            module, _, side = name.rpartition(".lora_")
            if not module or side not in ("a", "b"):
                raise not_plain(name)
            pairs.add(module + ".weight", side, name, array)
        for name, a, b in pairs.complete():
            if name.endswith("embed_tokens.weight"):
                a, b = b, a
            elif a.ndim == 2:
                a, b = a.T, b.T
            changes[name] = low_rank(name, a, b, rank, scale)
    return AdapterFile(path.resolve().name, str(path), HUGGING_FACE, changes, {})


def _read_gguf(path: Path) -> AdapterFile:
    """llama.cpp's `llama-adapter.cpp`: `[rank, in]` and `[out, rank]`, also in stacks; of a table `[vocabulary, rank]`
    and `[hidden, rank]`. llama.cpp ignores norms that such a file has; here they count."""
    file, where = open_gguf(path), str(path)
    meta = Entries(file.metadata, where)
    if (kind := meta.text("general.type", "model")) != "adapter":
        raise InputError(f"{where}: its type is {kind[:64]!r}: not an adapter")
    if (kind := meta.text("adapter.type")) != "lora" or "adapter.alora.invocation_tokens" in meta:
        raise InputError(f"{where}: an adapter of type {kind[:64]!r}, or one that waits for a word: not plain LoRA")
    alpha = meta.number("adapter.lora.alpha", least=0.0)
    pairs, changes, replaced = Pairs[str](), {}, {}
    with located(path):
        for name, weight in file.tensors.items():
            target, _, side = name.rpartition(".lora_")
            values = np.asarray(jax.tree.map(np.asarray, weight).dequantize(jnp.float32))
            if target and side in ("a", "b"):
                pairs.add(target, side, name, values)
            elif name.endswith("_norm.weight"):
                replaced[name] = values
            else:
                raise not_plain(name)
        for name, a, b in pairs.complete():
            rank = b.shape[-1]
            if name == "token_embd.weight":
                a, b = b.T, a
            changes[name] = low_rank(name, a, b, rank, alpha / rank if alpha else 1.0)
    return AdapterFile(path.stem, where, GGUF, changes, replaced, file.architecture)
