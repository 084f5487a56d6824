"""Writes tests/golden/gpt_oss: tiny random GPT-OSS checkpoints, what transformers computes, and a harmony tokenizer.

Run with a Python that has torch, transformers and safetensors (README.md beside the checkpoints names the versions).
Without arguments the directories and the README are written anew; with --check nothing is written, and everything is
computed again, by other ways where there are any, and compared.

Each directory of a model holds

    model.safetensors  bfloat16, the experts as transformers holds them or as gpt-oss was published, in MXFP4
    config.json        as transformers 5 spells it
    config_old.json    (mxfp4 only) the same config with the keys of the published gpt-oss-20b
    golden.npz         tokens int32 [2, T], logits float32 [2, T, V] of the float32 model that has exactly the values of
                       the file, greedy int32 [12], what `generate` appends to the first prompt

Weights are drawn as in tiny_checkpoints.py, but gate and up are three times as large, so that the clamp at 7 acts, and
down as much smaller; sinks are uniform in -1..3. MXFP4 is encoded here, in numpy, by the rule of the OCP: the
exponent of a block is floor(log2(largest)) - 2, the values are rounded to nearest even and saturate at 6. One block
is zero, with scale 0. A golden is refused if one of the mistakes in `mistakes`, but for HARMLESS, does not show in the
logits; README.md says how much each does.

harmony/ holds chat_template.jinja, the one file that is not written here; renderings.json, what transformers makes of
it; a tokenizer as gpt-oss has it but for its size; and tokens.json, the ids of some texts.
"""

import argparse
import copy
import json
import platform
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints as base
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import BOS, EOS, directory_size, forward, generate, golden, rope
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

ROOT = Path(__file__).resolve().parents[1] / "golden" / "gpt_oss"
HARMONY = ROOT / "harmony"
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, FULL, SLIDING],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 512 * 32,
    "rms_norm_eps": 1e-3,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    # The ramp goes from 1.49 to 7.03, or, rounded, from 1 to 8: frequencies that turn fast enough for 24 positions.
    **rope(
        150.0, "yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=512
    ),
}
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LEAST = 0.05  # the least difference of logits, whose standard deviation is about 1.5, by which a mistake has to show
MARGIN = 4e-3  # between the probabilities of chosen and refused experts, so that 8-bit activations choose as well
HARMLESS = "gate clamped below as well"  # silu(-7 * 1.702) is almost 0: the one mistake that never shows


@dataclass(frozen=True)
class Case:
    """One checkpoint."""

    what: str
    config: transformers.PreTrainedConfig
    seed: int
    mxfp4: bool = False
    short: int = 0  # for tiny_checkpoints.golden


def cases() -> dict[str, Case]:
    def config(**more: Any) -> transformers.GptOssConfig:
        return transformers.GptOssConfig(**{**COMMON, **more})

    square = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "hidden_size": 32, "num_attention_heads": 4}
    return {
        "bf16": Case(
            "experts in bfloat16, gate_up_proj [E, H, 2I], gate and up by turns on the last axis", config(), 7
        ),
        "mxfp4": Case(
            "experts in MXFP4 as published; intermediate_size 96 is 3 blocks, which 2, 4 or 8 devices cut",
            config(intermediate_size=96),
            52,
            mxfp4=True,
        ),
        "square": Case(
            "bfloat16; hidden_size == intermediate_size: the shape of down_proj does not tell its orientation",
            config(**square, intermediate_size=32),
            88,
        ),
        "square_gate_up": Case(
            "bfloat16; hidden_size == 2 * intermediate_size: the shape of gate_up_proj does not tell its orientation",
            config(**square, intermediate_size=16),
            158,
        ),
    }


def randomize(model: torch.nn.Module, seed: int) -> None:
    """See the module docstring. transformers' [E, in, out] takes its variance from `in`."""
    base.randomize(model, seed)
    gen = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("sinks"):
                p.uniform_(-1.0, 3.0, generator=gen)
            elif name.endswith("gate_up_proj_bias"):
                p.normal_(0.0, 1.0, generator=gen)
            elif name.endswith(("gate_up_proj", "down_proj")):
                gain = 3.0 if "gate_up" in name else 0.1
                p.normal_(0.0, gain * p.shape[-2] ** -0.5, generator=gen)
            elif re.search(r"[qk]_proj\.weight|o_proj", name):  # YaRN's factor makes scores sharp enough
                p.mul_(0.6)
            elif "router" in name:
                p.mul_(1.5)


def encode(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MXFP4 of [..., in]: blocks [..., in / 32, 16], element 2k in the low half of byte k; scales [..., in / 32]."""
    tiles = w.astype(np.float64).reshape(*w.shape[:-1], -1, 32)
    largest = np.abs(tiles).max(-1)
    exponent = np.floor(np.log2(largest, out=np.full_like(largest, -np.inf), where=largest > 0)) - 2
    exponent = np.clip(exponent, -127, 127)
    x = np.abs(tiles) * 2.0 ** -exponent[..., None]
    distance = np.abs(x[..., None] - E2M1)
    # Of two as near the one whose code, and so whose last bit, is even.
    code = np.where(np.arange(8) % 2, distance, np.nextafter(distance, -1)).argmin(-1).astype(np.uint8)
    code |= np.signbit(tiles).astype(np.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


def stored(tensors: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """The tensors of the file from float32 ones."""
    gen = torch.Generator().manual_seed(3000 + case.seed)
    out = {}
    for name, x in sorted(tensors.items()):
        if case.mxfp4 and name.endswith(("gate_up_proj", "down_proj")):
            w = x.mT.contiguous()  # [E, out, in]
            gain = 2 ** torch.empty(*w.shape[:2], w.shape[2] // 32).uniform_(-1, 1, generator=gen)
            w *= gain.repeat_interleave(32, 2)  # so that neighbours have other scales
            w[0, 0, :32] = 0
            for part, value in zip(("blocks", "scales"), encode(w.numpy()), strict=True):
                out[f"{name}_{part}"] = torch.tensor(value)
        else:
            out[name] = x.bfloat16().contiguous()
    return out


def dequantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' values, float32 [E, in, out], in place of blocks and scales."""
    out = {}
    for name, x in tensors.items():
        if name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            out[name] = convert_moe_packed_tensors(x, tensors[f"{name}_scales"], dtype=torch.float32)
        elif not name.endswith("_scales"):
            out[name] = x
    return out


def load(path: Path, config_file: str = "config.json", **more: Any) -> torch.nn.Module:
    """The model in float32, every tensor used and none missing; MXFP4 is dequantized into another directory."""
    config = transformers.AutoConfig.from_pretrained(path / config_file)
    more = {"attn_implementation": "eager", "experts_implementation": "eager"} | more
    with tempfile.TemporaryDirectory() as temporary:
        if getattr(config, "quantization_config", None):
            del config.quantization_config
            tensors = dequantize(load_file(path / "model.safetensors"))
            path = Path(temporary)
            config.save_pretrained(path)
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return checked(path, config=config, **more)


def checked(path: Path, **more: Any) -> torch.nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **more
    )
    if bad := {k: v for k, v in info.items() if v}:
        raise ValueError(f"{path.name}: {bad}")
    return model.eval()


def mistakes(case: Case) -> dict[str, Callable[[torch.nn.Module], None]]:
    """What an implementation could do wrong, done to a model."""
    turns = torch.arange(2 * case.config.intermediate_size)
    halves = torch.cat([turns[::2], turns[1::2]]).argsort()  # moves what is read as gate to where halves would be cut

    def parameters(ends: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
        def apply(model: torch.nn.Module) -> None:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith(ends):
                        p.copy_(change(p.clone()))

        return apply

    def activation(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable:
        def apply(model: torch.nn.Module) -> None:
            for layer in model.model.layers:
                layer.mlp.experts._apply_gate = lambda x: function(x[..., ::2], x[..., 1::2])

        return apply

    def config(**more: Any) -> Callable:
        def apply(model: torch.nn.Module) -> None:
            for key, value in more.items():
                setattr(model.config, key, value)

        return apply

    def rotary(**more: Any) -> Callable:
        def apply(model: torch.nn.Module) -> None:
            changed = copy.deepcopy(model.config)
            changed.rope_parameters = {**changed.rope_parameters, **more}
            model.model.rotary_emb = GptOssRotaryEmbedding(changed)

        return apply

    def probabilities_of_all(model: torch.nn.Module) -> None:
        def route(self: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = torch.nn.functional.linear(x, self.weight, self.bias)
            return logits, *logits.softmax(-1).topk(self.top_k)

        for layer in model.model.layers:
            layer.mlp.router.forward = route.__get__(layer.mlp.router)

    def epsilon(model: torch.nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-5

    def act(g: torch.Tensor, u: torch.Tensor, alpha: float = 1.702, one: float = 1.0) -> torch.Tensor:
        return (u + one) * g * torch.sigmoid(alpha * g)

    layers = case.config.num_hidden_layers
    found = {
        "no sinks": parameters(("sinks",), lambda p: torch.full_like(p, -1e4)),
        "sinks of 0 (a softmax with 1 added below)": parameters(("sinks",), torch.zeros_like),
        "sinks of other heads": parameters(("sinks",), lambda p: p.roll(1)),
        "no window in any layer": config(layer_types=[FULL] * layers),
        "a window in every layer": config(layer_types=[SLIDING] * layers),
        "windows in odd layers": config(layer_types=([FULL, SLIDING] * layers)[:layers]),
        "a window of 7": config(sliding_window=7),
        "a window of 9": config(sliding_window=9),
        "YaRN: truncate true (llama.cpp does)": rotary(truncate=True),
        "YaRN: attention factor 1": rotary(attention_factor=1.0),
        "YaRN: attention factor once, not for both q and k": rotary(attention_factor=(0.1 * np.log(32) + 1) ** 0.5),
        "no YaRN": rotary(rope_type="default"),
        "no clamp": activation(act),
        "no clamp of gate": activation(lambda g, u: act(g, u.clamp(-7, 7))),
        HARMLESS: activation(lambda g, u: act(g.clamp(-7, 7), u.clamp(-7, 7))),
        "no clamp of up": activation(lambda g, u: act(g.clamp(max=7), u)),
        "up clamped above only": activation(lambda g, u: act(g.clamp(max=7), u.clamp(max=7))),
        "clamp after up + 1": activation(lambda g, u: act(g.clamp(max=7), (u + 1).clamp(-7, 7), one=0)),
        "no 1 added to up": activation(lambda g, u: act(g.clamp(max=7), u.clamp(-7, 7), one=0)),
        "alpha 1 (silu)": activation(lambda g, u: act(g.clamp(max=7), u.clamp(-7, 7), alpha=1)),
        "gate and up exchanged": activation(lambda g, u: act(u.clamp(max=7), g.clamp(-7, 7))),
        "gate and up as halves": parameters(("gate_up_proj", "gate_up_proj_bias"), lambda p: p[..., halves]),
        "softmax over all experts, not renormalised": probabilities_of_all,
        "no bias of the router": parameters(("router.bias",), torch.zeros_like),
        "no bias of gate and up": parameters(("gate_up_proj_bias",), torch.zeros_like),
        "no bias of down": parameters(("down_proj_bias",), torch.zeros_like),
        **{f"no bias of {p}": parameters((f"{p}_proj.bias",), torch.zeros_like) for p in "qkvo"},
        "rms_norm_eps 1e-5": epsilon,
    }
    if case.config.hidden_size == case.config.intermediate_size:
        found["down_proj transposed"] = parameters(("down_proj",), lambda p: p.mT.clone())
    if case.config.hidden_size == 2 * case.config.intermediate_size:
        found["gate_up_proj transposed"] = parameters(("gate_up_proj",), lambda p: p.mT.clone())
    if case.mxfp4:

        def as_ggml(p: torch.Tensor) -> torch.Tensor:
            tiles = p.mT.unflatten(-1, (-1, 16, 2))  # [E, out, blocks, bytes, halves]
            return tiles.mT.reshape(p.mT.shape).mT

        def swapped(p: torch.Tensor) -> torch.Tensor:
            return p.mT.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).mT

        found["halves of bytes as GGML orders them"] = parameters(("gate_up_proj", "down_proj"), as_ggml)
        found["high half of a byte first"] = parameters(("gate_up_proj", "down_proj"), swapped)
    return found


def sensitivity(path: Path, case: Case, gold: dict[str, np.ndarray]) -> dict[str, float]:
    """By how much each mistake changes the logits at most."""
    tokens, out = torch.tensor(gold["tokens"]).long(), {}
    for name, apply in mistakes(case).items():
        model = load(path)
        apply(model)
        out[name] = float(np.abs(forward(model, tokens).numpy() - gold["logits"]).max())
        assert out[name] > LEAST or name == HARMLESS, (
            f"{name}: changes logits by {out[name]:.2g} only, choose another seed"
        )
    return out


def clamped(path: Path, gold: dict[str, np.ndarray]) -> str:
    """How many values the clamp changes."""
    model, counts = load(path), Counter()
    for layer in model.model.layers:

        def counting(x: torch.Tensor, experts: torch.nn.Module = layer.mlp.experts) -> torch.Tensor:
            gate, up = x[..., ::2], x[..., 1::2]
            for name, hit in (("gate > 7", gate > 7), ("up > 7", up > 7), ("up < -7", up < -7)):
                counts[name] += int(hit.sum())
            counts["all"] += gate.numel()
            return type(experts)._apply_gate(experts, x)

        layer.mlp.experts._apply_gate = counting
    forward(model, torch.tensor(gold["tokens"]).long())
    total = counts.pop("all")
    return ", ".join(f"{name} {count}" for name, count in counts.items()) + f" of {total}"


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the keys of the published gpt-oss-20b."""
    ours = ("bos_token_id", "dtype", "swiglu_alpha")
    config = {k: v for k, v in config.items() if k not in ours}
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = dict(sorted(scaling.items()))
    config["initial_context_length"] = scaling["original_max_position_embeddings"]
    config["experts_per_token"] = config["num_experts_per_tok"]
    config["transformers_version"] = "4.55.0.dev0"
    return dict(sorted(config.items()))


def make(name: str, case: Case) -> None:
    path = ROOT / name
    model = transformers.AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    randomize(model, case.seed)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        tensors = load_file(Path(temporary) / "model.safetensors")
        config = json.loads((Path(temporary) / "config.json").read_text())
        shutil.copy(Path(temporary) / "generation_config.json", path)
    config["dtype"] = "bfloat16"
    if case.mxfp4:
        config["quantization_config"] = QUANTIZATION
        write_json(path / "config_old.json", old_spelling(config))
    write_json(path / "config.json", config)
    save_file(stored(tensors, case), path / "model.safetensors", metadata={"format": "pt"})
    model = load(path)
    arrays = golden(model, case)
    whole = torch.tensor([*arrays["tokens"][0], *arrays["greedy"]])[None].long()
    for tokens in (whole, torch.tensor(arrays["tokens"]).long()):
        assert base.narrowest_routing(model, tokens) > MARGIN, "a near tie of experts: choose another seed"
    np.savez_compressed(path / "golden.npz", **arrays)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_golden(path: Path) -> dict[str, np.ndarray]:
    with np.load(path / "golden.npz") as z:
        return dict(z)


# --- harmony ---

O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
UNMERGED = ("Ġhello", "123", "Ġcommentary", "Ġassistant")  # whole words for ignore_merges
# In the order of gpt-oss, whose ids have gaps.
SPECIAL = ["startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call"]
SPECIAL = [f"<|{name}|>" for name in SPECIAL]
CORPUS = [
    "the user said hello and the assistant said that it is what they'll do, don't you think so? I'm here.",
    "The HTTPServer camelCase words 123 1234 2024 2025 100000 and 你好世界 你好 日本語 日本語 привет привет",
    "for i in range(100):\n    print(i)\n\n    return x != y  # hello\n\n\n",
    "analysis commentary final analysis commentary final system developer user assistant hello hello world world",
]
TEXTS = [
    "Hello, world!",
    " Hello  world   ",
    "I'm sure they've said we'll go, don't you? IT'S WHAT SHE'D SAY",
    "1 12 123 1234 1234567 3.14159 1,000,000",
    "camelCase HTTPServer XMLHttpRequest iPhone aB ABc",
    "你好，世界！今天 2024 年。日本語のテスト",
    "Привет, мир! ПриветМир",
    "naïve café ÉCOLE e\u0301cole",
    "a\n\nb\r\n\r\n  c\n\t d\n   \n",
    "def f(x):\n    return x != y  # ok\n\n\n",
    "👍🏽 👨‍👩‍👧 ok 🎉🎉",
    "path/to//file.txt https://example.org/a?b=c&d=1/\n/\n",
    "\u00a0non\u2003breaking\u200b space\u3000x",
    "what whatever analysis commentary",
    "<|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>analysis<|message|>hello<|return|>",
    "<|call|> <|constrain|>json <|endoftext|><|startoftext|> <|other|>",
    "",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["place"],
        },
    },
}


def conversations() -> list[dict[str, Any]]:
    """Messages, and arguments for the template."""

    def said(*turns: str) -> list[dict[str, Any]]:
        return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]

    hello, more = ("user: Hello!", "assistant: Hi, what can I do?"), {"add_generation_prompt": True}
    call = {"name": "get_weather", "arguments": {"place": "Paris"}}
    called = {"role": "assistant", "thinking": "I must look.", "tool_calls": [{"type": "function", "function": call}]}
    return [
        {"messages": said("user: Hello!"), "kwargs": {}},
        {"messages": said("user: Hello!"), "kwargs": more},
        {"messages": said("system: You are terse.\nVery.", "user: Hello!"), "kwargs": more},
        {"messages": said("developer: Answer in verse.", "user:  Why? \n"), "kwargs": more},
        {"messages": said(*hello, "user: Count to 3."), "kwargs": more},
        {"messages": said("system: Be kind.", *hello, "user: Count to 3.", "assistant: 1 2 3"), "kwargs": {}},
        {"messages": said(*hello, "user: Think hard."), "kwargs": more | {"reasoning_effort": "high"}},
        {"messages": said("user: Hello!"), "kwargs": more | {"model_identity": "You are a test."}},
        {
            "messages": [*said("user: 2 + 2?"), {"role": "assistant", "thinking": "Easy.", "content": "4"}],
            "kwargs": {},
        },
        {"messages": said("user: How is Paris?"), "kwargs": more | {"tools": [WEATHER]}},
        {
            "messages": [*said("user: How is Paris?"), called, {"role": "tool", "content": {"sky": "blue"}}],
            "kwargs": more | {"tools": [WEATHER], "reasoning_effort": "low"},
        },
    ]


def harmony_tokenizer() -> Tokenizer:
    """Byte-level BPE as o200k_harmony is, of few merges."""
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pieces
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in model["merges"] if "".join(m) not in UNMERGED]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def make_harmony() -> None:
    """All but the template."""
    tokenizer = harmony_tokenizer()
    tokenizer.save(str(HARMONY / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config = {**names, "clean_up_tokenization_spaces": False, "model_max_length": 512 * 32}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(HARMONY / "tokenizer_config.json", dict(sorted(config.items())))
    generation = {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids[token] for token in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": ids["<|endoftext|>"],
    }
    write_json(HARMONY / "generation_config.json", generation)
    for file, content in harmony_golden().items():
        write_json(HARMONY / file, content)


def harmony_golden() -> dict[str, list[dict[str, Any]]]:
    """What transformers makes of the files."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(HARMONY)
    rendered = []
    for conversation in conversations():
        text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, **conversation["kwargs"])
        text, dates = re.subn(r"(?<=Current date: )\d{4}-\d\d-\d\d", "{DATE}", text)
        assert dates == 1
        rendered.append({**conversation, "text": text})
    ids = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    for each in ids:
        assert tokenizer.decode(each["ids"], skip_special_tokens=False) == each["text"]
    return {"renderings.json": rendered, "tokens.json": ids}


# --- all ---


def write_readme(all_cases: dict[str, Case]) -> None:
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "tokenizers", "safetensors", "numpy"))
    golds = {name: read_golden(ROOT / name) for name in all_cases}
    shown = {name: sensitivity(ROOT / name, case, golds[name]) for name, case in all_cases.items()}
    every = list(dict.fromkeys(mistake for of_case in shown.values() for mistake in of_case))

    def row(mistake: str) -> str:
        return " | ".join(f"{of[mistake]:.2f}" if mistake in of else "" for of in shown.values())

    lines = [
        "# Tiny random GPT-OSS checkpoints",
        "",
        "Written by `tests/reference/tiny_gpt_oss.py`, which describes the files.",
        f"Made with Python {platform.python_version()}, {packages}.",
        "With `--check` it compares every directory with its golden. The weights are random: nothing here comes from a",
        "published model but `harmony/chat_template.jinja`. Do not edit by hand.",
        "",
        "All models: 2 of 4 experts, sinks, biases, windows of 8 in layers 0 and 2, YaRN with truncate false.",
        "",
        "| directory | KB | what is special | values that the clamp changes |",
        "|---|---|---|---|",
        *(
            f"| {name} | {directory_size(ROOT / name) / 1024:.0f} | {case.what} | {clamped(ROOT / name, golds[name])} |"
            for name, case in all_cases.items()
        ),
        f"| harmony | {directory_size(HARMONY) / 1024:.0f} | chat template, renderings, tokenizer, ids | |",
        "",
        "`harmony/chat_template.jinja` is OpenAI's template of gpt-oss-120b (Apache-2.0), as llama.cpp has it in",
        "`models/templates/openai-gpt-oss-120b.jinja` (in the sdist of llama-cpp-python 0.3.36). It writes the",
        "date (`strftime_now`): in `renderings.json` every such date is `{DATE}`. `generation_config.json` has three",
        f"tokens that end a text. {', '.join(f'`{word}`' for word in UNMERGED)} are in the vocabulary but in no merge.",
        "",
        "## Sensitivity",
        "",
        "The largest change of a logit by a mistake in the model; the standard deviation of the logits is 1.5 to 1.6.",
        "A model that computes in bfloat16 throughout is off by "
        + ", ".join(f"{in_bfloat16(ROOT / name, gold):.2f}" for name, gold in golds.items())
        + ".",
        "",
        f"| mistake | {' | '.join(shown)} |",
        f"|---|{'---|' * len(shown)}",
        *(f"| {mistake} | {row(mistake)} |" for mistake in every),
        "",
        "llama.cpp (llama-cpp-python 0.3.36, files by `tests/hf_to_gguf.py`, measured once) lacks a key for truncate,",
        "and rounds the ends of YaRN's ramp. It is off by what the table says of that: 0.21, 0.50, 0.28, 0.32. From",
        "transformers with truncate true it differs by 5e-6, in mxfp4, where it rounds activations to Q8_0, by 0.10.",
    ]
    (ROOT / "README.md").write_text("\n".join(lines) + "\n")


def in_bfloat16(path: Path, gold: dict[str, np.ndarray]) -> float:
    model = load(path).bfloat16()
    model.model.rotary_emb = GptOssRotaryEmbedding(model.config)  # whose frequencies stay as they are
    return float(np.abs(forward(model, torch.tensor(gold["tokens"]).long()).float().numpy() - gold["logits"]).max())


def differences(path: Path, config_file: str, gold: dict[str, np.ndarray]) -> Iterator[str]:
    """What differs from the golden arrays by more than rounding."""
    tokens = torch.tensor(gold["tokens"]).long()
    model = load(path, config_file, experts_implementation="batched_mm")
    worst = np.abs(forward(model, tokens).numpy() - gold["logits"]).max()
    if not worst < 1e-4:
        yield f"logits differ by {worst:.2g}"
    if not np.array_equal(generate(model, tokens).numpy(), gold["greedy"]):
        yield "greedy tokens differ"


def check() -> int:
    """Prints a line for each config of each directory; the number that differ."""
    failures = 0
    for name, case in cases().items():
        gold = read_golden(ROOT / name)
        for config in sorted((ROOT / name).glob("config*.json")):
            found = list(differences(ROOT / name, config.name, gold))
            failures += bool(found)
            print(f"{name}/{config.name}: {'; '.join(found) or 'ok'}")
        if case.mxfp4:  # transformers' own loader, which dequantizes where it has no kernels
            own = transformers.Mxfp4Config(dequantize=True)
            model = checked(ROOT / name, quantization_config=own, attn_implementation="eager")
            worst = np.abs(forward(model, torch.tensor(gold["tokens"]).long()).numpy() - gold["logits"]).max()
            failures += not worst < 1e-4
            print(f"{name} by transformers' loader: logits differ by {worst:.2g}")
        sensitivity(ROOT / name, case, gold)
    for file, content in harmony_golden().items():
        same = json.loads((HARMONY / file).read_text(encoding="utf-8")) == content
        failures += not same
        print(f"harmony/{file}: {'ok' if same else 'differs'}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.check:
        sys.exit(1 if check() else 0)
    all_cases = cases()
    for name, case in all_cases.items():
        print(name)
        make(name, case)
    make_harmony()
    write_readme(all_cases)


if __name__ == "__main__":
    main()
