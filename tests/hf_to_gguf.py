"""A tiny Hugging Face checkpoint as a GGUF file, as llama.cpp's convert_hf_to_gguf.py would write it.

Names come from gguf-py's own table; the rest (the order of q and k rows, merged experts, rope tensors, metadata)
follows that script, so that what is read here is checked against what others write.
"""

import json
import math
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def convert(folder: Path, path: Path, *, merged_experts: bool = True, per_layer: bool = False) -> None:
    """Write `folder` to `path`.

    Args:
        merged_experts: one tensor for all experts, or one for each as files had before April 2024.
        per_layer: give head counts and widths as arrays, one value a layer.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    add[list] = writer.add_array
    for key, value in metadata(config, tensors, per_layer).items():
        add[type(value)](f"{writer.arch}.{key}", value)

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in (tensors | rope_tensors(config)).items():
        part = name.split(".")[-2]
        if writer.arch == "llama" and part in heads:
            tensor = neighbours(tensor, heads[part])
        if ".experts." in name and name.endswith(".weight"):
            before, _, rest = name.partition(".experts.")
            index, projection = rest.split(".")[:2]
            experts.setdefault(f"{before}.experts.{projection}.weight", {})[int(index)] = tensor
        elif name.startswith("rope_"):
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")) or name, tensor.astype(np.float32))
    for name, stack in experts.items():
        merged = names.get_name(name, (".weight",))
        if merged_experts:
            writer.add_tensor(merged, np.stack([stack[i] for i in range(len(stack))]).astype(np.float32))
        else:
            for i, tensor in stack.items():
                writer.add_tensor(merged.replace("_exps", f".{i}"), tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute`: rows of a head from half-split order to neighbours."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def metadata(config: dict, tensors: dict, per_layer: bool) -> dict[str, object]:
    layers, rope = config["num_hidden_layers"], config["rope_parameters"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def each(value: int) -> int | list[int]:
        return [value] * layers if per_layer else value

    values = {
        "block_count": layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": each(config["intermediate_size"]),
        "attention.head_count": each(config["num_attention_heads"]),
        "attention.head_count_kv": each(config["num_key_value_heads"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
        if config.get("norm_topk_prob") is False and config["model_type"] == "qwen3_moe":
            values["expert_weights_norm"] = False  # otherwise each architecture has its own way
        values["expert_feed_forward_length"] = config.get("moe_intermediate_size") or config["intermediate_size"]
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] in ("yarn", "longrope"):
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        stretch = config["max_position_embeddings"] / original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    return values


def rope_tensors(config: dict) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{size}.weight": np.array(rope[f"{size}_factor"], np.float32) for size in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context, factors = rope["original_max_position_embeddings"], []
    dim = config["head_dim"]
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}
