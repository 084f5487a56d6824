"""DeepSeek's inference demo (model.py, kernel.py, convert.py) in numpy: its mathematics on one rank.

Names are the demo's: wq_a, q_norm, wkv_b, gate, w1, ... in a dict of tensors `layers.0.attn.wq.weight`. Where the demo
depends on the machine it is made plain here: no bfloat16 roundings but those of FP8, the logits of every position, a
cache that grows, FP8 blocks of any size, the last one possibly smaller.

`ModelArgs` has the demo's fields, and a few for what published checkpoints and transformers do otherwise; `as_demo`
sets these to what the demo does.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": E4M3}
MAPPING = {  # convert.py
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate": "gate",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "norm": "norm",
    "lm_head": "head",
}


@dataclass(frozen=True)
class ModelArgs:
    max_seq_len: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    # moe
    n_routed_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    score_func: Literal["softmax", "sigmoid"]
    route_scale: float
    # mla
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # yarn
    original_seq_len: int
    rope_theta: float
    rope_factor: float = 1.0
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    # not in the demo
    block: tuple[int, int] = (128, 128)  # of FP8 weights; activations in groups of block[1]
    norm_eps: float = 1e-6  # of all but q_norm and kv_norm
    mscale_all_dim: float | None = None  # then this is softmax's, and cos and sin get the quotient of the two
    norm_topk_prob: bool | None = None  # None: for sigmoid
    rope_interleave: bool = True
    masked_score: float = -np.inf  # of experts in refused groups; the demo multiplies by 0


def as_demo(args: ModelArgs) -> ModelArgs:
    """The same model as the demo would compute it."""
    fields = ("norm_eps", "mscale_all_dim", "norm_topk_prob", "rope_interleave")
    return replace(args, masked_score=0.0, **{f: getattr(ModelArgs, f) for f in fields})


def model_args(config: dict) -> ModelArgs:
    """From a config.json, of DeepSeek's or transformers' spelling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    assert kind in ("default", "yarn"), kind
    yarn = {}
    if kind == "yarn":
        yarn = {key: scaling[key] for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
        yarn["rope_factor"] = scaling["factor"]
    v3 = config["model_type"] == "deepseek_v3"
    groups = (config["n_group"], config["topk_group"])
    if config.get("topk_method", "noaux_tc") == "greedy":
        groups = (1, 1)
    return ModelArgs(
        max_seq_len=config["max_position_embeddings"],
        n_layers=config["num_hidden_layers"],
        n_dense_layers=config["first_k_dense_replace"],
        n_heads=config["num_attention_heads"],
        n_routed_experts=config["n_routed_experts"],
        n_activated_experts=config["num_experts_per_tok"],
        n_expert_groups=groups[0],
        n_limited_groups=groups[1],
        score_func=config.get("scoring_func", "sigmoid" if v3 else "softmax"),
        route_scale=config["routed_scaling_factor"],
        q_lora_rank=config["q_lora_rank"] or 0,
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        original_seq_len=scaling.get("original_max_position_embeddings", config["max_position_embeddings"]),
        rope_theta=scaling.get("rope_theta", config.get("rope_theta")),
        **yarn,
        block=tuple(config.get("quantization_config", {}).get("weight_block_size", ModelArgs.block)),
        norm_eps=config["rms_norm_eps"],
        norm_topk_prob=config["norm_topk_prob"],
        rope_interleave=config.get("rope_interleave", True),
    )


def read_safetensors(path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    out = {}
    for name, x in header.items():
        begin, end = (start + offset for offset in x["data_offsets"])
        out[name] = np.frombuffer(content[begin:end], DTYPES[x["dtype"]]).reshape(x["shape"])
    return out


def demo_names(tensors: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Hugging Face's names as the demo's; the layers for multi-token prediction are left out."""
    out = {}
    for name, x in tensors.items():
        name = name.removeprefix("model.")
        parts = name.replace("self_attn", "attn").replace("mlp", "ffn").split(".")
        if parts[0] == "layers" and int(parts[1]) >= n_layers:
            continue
        parts[-2] = MAPPING[parts[-2]]
        parts[-1] = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}.get(parts[-1], parts[-1])
        out[".".join(parts)] = x
    return out


# kernel.py


def act_quant(x: np.ndarray, block_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 of the shape of x and float32 scales [..., ceil(K / block_size)], one a group of the last axis.

    A group of zeros gives zeros and a scale of 1; the demo's kernel divides 0 by 0.
    """
    x = x.astype(np.float32)
    starts = np.arange(0, x.shape[-1], block_size)
    s = np.maximum.reduceat(np.abs(x), starts, axis=-1) / np.float32(E4M3_MAX)
    s = np.where(s == 0, np.float32(1), s)
    return (x / np.repeat(s, block_size, -1)[..., : x.shape[-1]]).astype(E4M3), s


def weight_dequant(x: np.ndarray, s: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """float32 [M, N] from E4M3 [M, N] and scales [ceil(M / block[0]), ceil(N / block[1])]."""
    m, n = x.shape
    assert s.shape == (-(-m // block[0]), -(-n // block[1])), (x.shape, s.shape, block)
    return x.astype(np.float32) * s.repeat(block[0], 0)[:m].repeat(block[1], 1)[:, :n]


def fp8_gemm(
    a: np.ndarray, a_s: np.ndarray, b: np.ndarray, b_s: np.ndarray, block: tuple[int, int] = (128, 128)
) -> np.ndarray:
    """float32 a @ b.T: a [..., K] with a_s [..., K / block[1]], b [N, K] with b_s [N / block[0], K / block[1]].

    Each block of K is multiplied and summed by itself, scaled, and added up in float32.
    """
    out = np.zeros((*a.shape[:-1], b.shape[0]), np.float32)
    b_s = b_s.repeat(block[0], 0)[: b.shape[0]]  # [N, K / block[1]]
    for i in range(a_s.shape[-1]):
        k = slice(i * block[1], (i + 1) * block[1])
        dot = a[..., k].astype(np.float32) @ b[:, k].astype(np.float32).T
        out += dot * a_s[..., i, None] * b_s[:, i]
    return out


# model.py


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps)) * weight.astype(x.dtype)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def precompute_freqs_cis(args: ModelArgs, seqlen: int) -> np.ndarray:
    """complex128 [seqlen, rope / 2]."""
    dim, base = args.qk_rope_head_dim, args.rope_theta

    def correction_dim(num_rotations: float) -> float:
        return dim * math.log(args.original_seq_len / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    freqs = 1.0 / base ** (np.arange(0, dim, 2) / dim)
    scale = 1.0
    if args.max_seq_len > args.original_seq_len:
        low = max(math.floor(correction_dim(args.beta_fast)), 0)
        high = min(math.ceil(correction_dim(args.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
        freqs = freqs / args.rope_factor * ramp + freqs * (1 - ramp)
        if args.mscale_all_dim is not None:
            scale = yarn_mscale(args.rope_factor, args.mscale) / yarn_mscale(args.rope_factor, args.mscale_all_dim)
    return scale * np.exp(1j * np.outer(np.arange(seqlen), freqs))


def apply_rotary_emb(x: np.ndarray, freqs_cis: np.ndarray, interleave: bool = True) -> np.ndarray:
    """x [B, T, heads, rope]; pairs are neighbours, or a whole half apart and then neighbours in the result."""
    if interleave:
        real, imaginary = x[..., 0::2], x[..., 1::2]
    else:
        real, imaginary = np.split(x, 2, -1)
    y = (real + 1j * imaginary) * freqs_cis[None, :, None]
    return np.stack([y.real, y.imag], -1).reshape(x.shape).astype(x.dtype)


def top_k(x: np.ndarray, k: int) -> np.ndarray:
    """Indices [..., k], the largest first; of equals the first."""
    return np.argsort(-x, -1, stable=True)[..., :k]


def gate(logits: np.ndarray, bias: np.ndarray | None, args: ModelArgs) -> tuple[np.ndarray, np.ndarray]:
    """Weights and indices [N, k] of the experts chosen by the router's logits [N, E]."""
    scores = softmax(logits) if args.score_func == "softmax" else 1 / (1 + np.exp(-logits))
    original_scores = scores
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if args.n_expert_groups > 1:
        grouped = scores.reshape(len(scores), args.n_expert_groups, -1)
        group_scores = grouped.max(-1) if bias is None else np.sort(grouped, -1)[..., -2:].sum(-1)
        keep = np.zeros(group_scores.shape, bool)
        np.put_along_axis(keep, top_k(group_scores, args.n_limited_groups), True, -1)
        scores = np.where(keep[..., None], grouped, args.masked_score).reshape(scores.shape)
    indices = top_k(scores, args.n_activated_experts)
    weights = np.take_along_axis(original_scores, indices, -1)
    if args.score_func == "sigmoid" if args.norm_topk_prob is None else args.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights * args.route_scale, indices


class Transformer:
    """The demo's model. Calling it continues what `self.cache` holds; `reset` forgets it.

    gemm_impl "bf16" multiplies with dequantized weights, "fp8" quantizes the activations of FP8 weights too.
    """

    def __init__(
        self,
        params: dict[str, np.ndarray],
        args: ModelArgs,
        dtype=np.float64,
        attn_impl: Literal["naive", "absorb"] = "absorb",
        gemm_impl: Literal["bf16", "fp8"] = "bf16",
    ):
        self.params, self.args, self.dtype = params, args, np.dtype(dtype)
        self.attn_impl, self.gemm_impl = attn_impl, gemm_impl
        self.reset()

    def reset(self) -> None:
        self.cache = [None] * self.args.n_layers  # pairs [B, T, ...]: keys and values, or latents and rotated keys
        self.start_pos = 0

    def weight(self, name: str) -> np.ndarray:
        w = self.params[f"{name}.weight"]
        if w.dtype == E4M3:
            w = weight_dequant(w, self.params[f"{name}.scale"], self.args.block)
        return w.astype(self.dtype)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        w = self.params[f"{name}.weight"]
        if w.dtype != E4M3 or self.gemm_impl == "bf16":
            return x @ self.weight(name).T
        q, s = act_quant(x, self.args.block[1])
        return fp8_gemm(q, s, w, self.params[f"{name}.scale"], self.args.block).astype(self.dtype)

    def norm(self, name: str, x: np.ndarray, eps: float | None = None) -> np.ndarray:
        return rms_norm(x, self.params[f"{name}.weight"], self.args.norm_eps if eps is None else eps)

    def remember(self, layer: int, *new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.cache[layer] is not None:
            new = tuple(np.concatenate(pair, 1) for pair in zip(self.cache[layer], new, strict=True))
        self.cache[layer] = new
        return new

    def attention(self, layer: int, x: np.ndarray, freqs_cis: np.ndarray, mask: np.ndarray) -> np.ndarray:
        args, at = self.args, f"layers.{layer}.attn"
        b, t, _ = x.shape
        h, nope, rope, v_dim = args.n_heads, args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim
        if args.q_lora_rank == 0:
            q = self.linear(f"{at}.wq", x)
        else:
            q = self.linear(f"{at}.wq_b", self.norm(f"{at}.q_norm", self.linear(f"{at}.wq_a", x), 1e-6))
        q_nope, q_pe = np.split(q.reshape(b, t, h, nope + rope), [nope], -1)
        q_pe = apply_rotary_emb(q_pe, freqs_cis, args.rope_interleave)
        kv, k_pe = np.split(self.linear(f"{at}.wkv_a", x), [args.kv_lora_rank], -1)
        kv = self.norm(f"{at}.kv_norm", kv, 1e-6)
        k_pe = apply_rotary_emb(k_pe[:, :, None], freqs_cis, args.rope_interleave)
        scale = (nope + rope) ** -0.5
        if args.max_seq_len > args.original_seq_len:
            mscale = args.mscale if args.mscale_all_dim is None else args.mscale_all_dim
            scale *= yarn_mscale(args.rope_factor, mscale) ** 2
        if self.attn_impl == "naive":
            k_nope, v = np.split(self.linear(f"{at}.wkv_b", kv).reshape(b, t, h, nope + v_dim), [nope], -1)
            k = np.concatenate([k_nope, np.broadcast_to(k_pe, (b, t, h, rope))], -1)
            k, v = self.remember(layer, k, v)
            scores = np.einsum("bshd,bthd->bsht", np.concatenate([q_nope, q_pe], -1), k)
            out = np.einsum("bsht,bthd->bshd", softmax(scores * scale + mask), v)
        else:  # wkv_b moves from the keys to the queries, and from the values to the result
            wkv_b = self.weight(f"{at}.wkv_b").reshape(h, nope + v_dim, -1)
            kv, k_pe = self.remember(layer, kv, k_pe[:, :, 0])
            q_nope = np.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :nope])
            scores = np.einsum("bshc,btc->bsht", q_nope, kv) + np.einsum("bshr,btr->bsht", q_pe, k_pe)
            out = np.einsum("bsht,btc->bshc", softmax(scores * scale + mask), kv)
            out = np.einsum("bshc,hdc->bshd", out, wkv_b[:, nope:])
        return self.linear(f"{at}.wo", out.reshape(b, t, -1))

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.w2", silu(self.linear(f"{name}.w1", x)) * self.linear(f"{name}.w3", x))

    def moe(self, name: str, x: np.ndarray) -> np.ndarray:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, indices = gate(self.linear(f"{name}.gate", x), self.params.get(f"{name}.gate.bias"), self.args)
        y = np.zeros_like(x)
        for expert in np.unique(indices):
            token, place = np.nonzero(indices == expert)
            y[token] += self.mlp(f"{name}.experts.{expert}", x[token]) * weights[token, place, None]
        return (y + self.mlp(f"{name}.shared_experts", x)).reshape(shape)

    def block(self, layer: int, x: np.ndarray, freqs_cis: np.ndarray, mask: np.ndarray) -> np.ndarray:
        at = f"layers.{layer}"
        x = x + self.attention(layer, self.norm(f"{at}.attn_norm", x), freqs_cis, mask)
        ffn = self.mlp if layer < self.args.n_dense_layers else self.moe
        return x + ffn(f"{at}.ffn", self.norm(f"{at}.ffn_norm", x))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of tokens [B, T]."""
        t, end = tokens.shape[1], self.start_pos + tokens.shape[1]
        freqs_cis = precompute_freqs_cis(self.args, end)[self.start_pos :]
        mask = np.triu(np.full((t, end), -np.inf, self.dtype), self.start_pos + 1)[:, None]  # [s, h, t]
        x = self.weight("embed")[tokens]
        for layer in range(self.args.n_layers):
            x = self.block(layer, x, freqs_cis, mask)
        self.start_pos = end
        return self.linear("head", self.norm("norm", x))


def load(path, **changes) -> tuple[dict[str, np.ndarray], ModelArgs]:
    """Tensors by the demo's names, and the arguments, of a Hugging Face directory."""
    args = replace(model_args(json.loads((path / "config.json").read_text())), **changes)
    return demo_names(read_safetensors(path / "model.safetensors"), args.n_layers), args
