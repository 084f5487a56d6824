"""A tiny Hugging Face checkpoint as a GGUF file, as llama.cpp's convert_hf_to_gguf.py would write it.

Names come from gguf-py's own table; the rest (the order of q and k rows, merged experts, rope tensors, metadata)
follows that script, so that what is read here is checked against what others write.
"""

import json
import math
import re
from pathlib import Path
from statistics import NormalDist

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
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gemma3n_text": gguf.MODEL_ARCH.GEMMA3N,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
}
PAIRED = ("llama", "granite", "smollm3")  # architectures whose converters reorder q and k to pair neighbours
SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


def convert(
    folder: Path,
    path: Path,
    *,
    merged_experts: bool = True,
    per_layer: bool = False,
    split_kv_b: bool = True,
    quantize: str | None = None,
    more_metadata: dict[str, object] | None = None,
    more_tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Write `folder` to `path`.

    Args:
        merged_experts: one tensor for all experts, or one for each as files had before April 2024.
        per_layer: give head counts and widths as arrays, one value a layer.
        split_kv_b: the form of DeepSeek's files since April 2025.
        quantize: a block type for all matrices of whole blocks but the router.
        more_metadata, more_tensors: instead of, or beside, what there is, by the names in the file.
    """
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    add[list] = writer.add_array
    values = metadata(config, tensors, per_layer)
    if writer.arch == "deepseek2":
        values, tensors = deepseek_metadata(values, config, split_kv_b), deepseek_tensors(tensors, config, split_kv_b)
    if writer.arch == "glm4moe":
        values = glm4_moe_metadata(values, config)
        tensors = {name.replace("correction_bias", "correction.bias"): tensor for name, tensor in tensors.items()}
    if writer.arch == "gpt-oss":
        tensors = gpt_oss_tensors(tensors)
    if writer.arch == "gemma3n":
        values, tensors = values | gemma3n_metadata(config), gemma3n_tensors(tensors, config)
    elif writer.arch.startswith("gemma"):
        tensors = gemma_tensors(tensors)
    for key, value in (values | (more_metadata or {})).items():
        add[type(value)](key if key.startswith("tokenizer.") else f"{writer.arch}.{key}", value)

    def put(name: str, tensor: np.ndarray) -> None:
        if tensor.dtype == np.uint8:  # blocks of GPT-OSS
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
            return
        tensor = tensor.astype(np.float32)
        matrix = tensor.ndim > 1 and not name.endswith(".bias")
        if quantize and matrix and tensor.shape[-1] % 32 == 0 and "ffn_gate_inp" not in name:
            kind = gguf.GGMLQuantizationType[quantize]
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in (tensors | rope_tensors(config)).items():
        part = name.split(".")[-2]
        if writer.arch in PAIRED and part in heads:
            tensor = neighbours(tensor, heads[part])
        if re.search(r"\.experts\.\d+\..*weight$", name):
            before, _, rest = name.partition(".experts.")
            index, projection = rest.split(".")[:2]
            experts.setdefault(f"{before}.experts.{projection}.weight", {})[int(index)] = tensor
        elif name.startswith("rope_"):
            writer.add_tensor(name, tensor)
        else:
            put(names.get_name(name, (".weight", ".bias")) or name, tensor)
    for name, stack in experts.items():
        merged = names.get_name(name, (".weight",))
        if merged_experts:
            put(merged, np.stack([stack[i] for i in range(len(stack))]))
        else:
            for i, tensor in stack.items():
                put(merged.replace("_exps", f".{i}"), tensor)
    for name, tensor in (more_tensors or {}).items():
        put(name, tensor)
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
    rope = rope.get("full_attention", rope)
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
    if "full_attention" in config["rope_parameters"]:
        values["rope.freq_base_swa"] = float(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap):
            values[cap] = config[cap]
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
        if config.get("norm_topk_prob") is False and config["model_type"] == "qwen3_moe":
            values["expert_weights_norm"] = False  # otherwise each architecture has its own way
        values["expert_feed_forward_length"] = config.get("moe_intermediate_size") or config["intermediate_size"]
    values |= {key: float(config[name]) for name, key in SCALES.items() if name in config}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] in ("yarn", "longrope"):
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    if config["model_type"] == "gpt_oss":  # there is no key for truncate: llama.cpp rounds the ends of the ramp
        values |= {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow")}
    if rope["rope_type"] == "longrope":
        stretch = config["max_position_embeddings"] / original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    return values


def deepseek_metadata(values: dict, config: dict, split_kv_b: bool) -> dict[str, object]:
    """`DeepseekV2Model.set_gguf_parameters`, of today or of before April 2025.

    Older files had no groups either, without which they would be other models: here they have. Those of V2 did not say
    how experts are scored.
    """
    nope, rotary, value = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    rope, v3 = config["rope_parameters"], config["model_type"] == "deepseek_v3"
    values = values | {
        "vocab_size": config["vocab_size"],
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.key_length": nope + rotary,
        "attention.value_length": value,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "rope.dimension_count": rotary,
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
    }
    if config["q_lora_rank"] is not None:
        values["attention.q_lora_rank"] = config["q_lora_rank"]
    if config["norm_topk_prob"] or not split_kv_b:
        values["expert_weights_norm"] = config["norm_topk_prob"]
    if v3 or split_kv_b:
        values["expert_gating_func"] = int(gguf.ExpertGatingFuncType["SIGMOID" if v3 else "SOFTMAX"])
    if "mscale_all_dim" in rope:
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
        if split_kv_b:
            values |= {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow")}
    if split_kv_b:
        rank = config["kv_lora_rank"]
        values |= {f"{key}_mla": values[key] for key in ("attention.key_length", "attention.value_length")}
        values |= {"attention.key_length": rank + rotary, "attention.value_length": rank, "attention.head_count_kv": 1}
    return values


def glm4_moe_metadata(values: dict, config: dict) -> dict[str, object]:
    """`Glm4MoeModel.set_gguf_parameters`."""
    return values | {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
        "nextn_predict_layers": config["num_nextn_predict_layers"],
    }


def deepseek_tensors(tensors: dict, config: dict, split_kv_b: bool) -> dict[str, np.ndarray]:
    """`DeepseekV2Model.modify_tensors`."""
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    out = {}
    for name, tensor in tensors.items():
        if split_kv_b and name.endswith("kv_b_proj.weight"):
            kv_b = tensor.reshape(heads, -1, tensor.shape[-1])
            out[name.replace("kv_b", "k_b")] = kv_b[:, :nope].swapaxes(1, 2)
            out[name.replace("kv_b", "v_b")] = kv_b[:, nope:]
        else:
            out[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    return out


def gpt_oss_tensors(tensors: dict) -> dict[str, np.ndarray]:
    """`GptOssModel`: gate and up, by turns before, apart; experts as [E, out, in], or as blocks of MXFP4."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            tensor = mxfp4_blocks(tensor, tensors[name.replace("_blocks", "_scales")])
        elif name.endswith(("gate_up_proj", "down_proj")):
            tensor = tensor.swapaxes(1, 2)
        name = re.sub("_proj(_blocks)?$", "_proj.weight", name).replace("_proj_bias", "_proj.bias")
        name = re.sub("sinks$", "sinks.weight", name)
        if "gate_up" in name:
            for i, part in enumerate(("gate", "up")):
                out[name.replace("gate_up", part)] = np.ascontiguousarray(tensor[:, i::2])
        else:
            out[name] = np.ascontiguousarray(tensor)
    return out


def gemma_tensors(tensors: dict) -> dict[str, np.ndarray]:
    """`Gemma2Model` and `Gemma3Model`: without what is for images, and norms as what they multiply by."""
    text = {name: x for name, x in tensors.items() if not name.startswith(("vision_tower", "multi_modal"))}
    return {
        name.removeprefix("language_model."): x.astype(np.float32) + 1 if name.endswith("norm.weight") else x
        for name, x in text.items()
    }


def gemma3n_metadata(config: dict) -> dict[str, object]:
    """`Gemma3NModel.set_gguf_parameters`."""
    pattern = config["activation_sparsity_pattern"]
    return {
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        "altup.active_idx": config["altup_active_idx"],
        "altup.num_inputs": config["altup_num_inputs"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "activation_sparsity_scale": [NormalDist().inv_cdf(s) if s else -math.inf for s in pattern],
    }


def gemma3n_tensors(tensors: dict, config: dict) -> dict[str, np.ndarray]:
    """`Gemma3NModel.modify_tensors`: small matrices in stacks, and rows of zeros for ids beyond a table."""
    out = {name + ".weight" * name.endswith("_scale"): tensor for name, tensor in tensors.items()}
    for kind in ("altup_projections", "altup_unembed_projections"):
        parts = [out.pop(f"model.{kind}.{i}.weight") for i in range(config["altup_num_inputs"] - 1)]
        out[f"model.{kind}.weight"] = np.stack(parts)
    table = out["model.embed_tokens_per_layer.weight"]
    beyond = np.zeros((config["vocab_size"] - len(table), table.shape[1]), table.dtype)
    return out | {"model.embed_tokens_per_layer.weight": np.concatenate([table, beyond])}


def mxfp4_blocks(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """GGML's bytes `[E, out, in / 32 * 17]`: the scale, then element i with i + 16, where neighbours shared a byte."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 2, 16)
    packed = codes[..., 0, :] | codes[..., 1, :] << 4
    return np.concatenate([scales[..., None], packed], -1).reshape(*blocks.shape[:2], -1)


def rope_tensors(config: dict) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
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
