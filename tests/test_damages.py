"""Descriptions of models, damaged: each is refused in one line that names the entry, or is still a model's.

Every entry of a valid description, in every dialect of every family, is replaced by each of DAMAGES. Nothing is read
from weights, so tensors are names with shapes.
"""

import json
import math
import struct
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import MODEL_ARCH_NAMES
from hf_to_gguf import ARCHITECTURES, deepseek_metadata, gemma3n_metadata, glm4_moe_metadata, metadata, rope_tensors
from test_demo_layout import fields
from tiny_ggml import write
from tiny_gguf import Tiny

from jaxllm.checkpoint.gguf import GGUFFile
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import DEEPSEEK_DEMO, GGUF, HUGGING_FACE, family_of

GOLDEN = Path(__file__).parent / "golden"

MISSING = object()
KINDS = ("full_attention", "sliding_attention")
DAMAGES = {
    "missing": MISSING,
    "null": None,
    "text": "x\ny",
    "negative": -1,
    "zero": 0,
    "huge": 10**9,
    "1e30": 1e30,
    "NaN": math.nan,
    "list": [],
    "object": {},
    "true": True,
}
NEVER = ("text", "negative", "NaN", "list", "object")  # sensible for no entry that is read

# Entries that mean nothing for logits, or that other parts of the program read.
UNREAD = {
    *("architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range"),
    *("output_router_logits", "pad_token_id", "pretraining_tp", "router_aux_loss_coef", "transformers_version"),
    *("use_cache", "qk_head_dim", "num_nextn_predict_layers", "resid_pdrop", "embd_pdrop", "router_jitter_noise"),
}
# Entries that models of this kind do not have, or that another entry takes the place of.
UNREAD_BY = {
    "deepseek_v2": {"head_dim", "num_key_value_heads", "mlp_bias"},
    "deepseek_v3": {"head_dim", "num_key_value_heads"},
    "phi3": {"original_max_position_embeddings"},  # also in rope_parameters
    "qwen2": {"max_window_layers"},  # layer_types
    "qwen2_moe": {"layer_types", "max_window_layers", "qkv_bias"},
    "qwen3_moe": {"max_window_layers"},
    "deepseek2": {"vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length"},
    "gemma2": {"attention.value_length"},
    "gemma3": {"attention.value_length"},
    "gemma3n": {"attention.value_length"},
    "gemma3n_text": {"altup_coef_clip", "attention_bias"},  # of training; the tensors show it
    "gemma3_text": {"_sliding_window_pattern", "sliding_window_pattern", "attn_logit_softcapping"},  # and layer_types
    "smollm3": {"layer_types", "no_rope_layer_interval"},
}


def tensor(*shape):
    return Dense(jax.ShapeDtypeStruct(shape, jnp.float32))


def config_of(folder):
    return json.loads((GOLDEN / folder / "config.json").read_text())


def hugging_face(folder):
    config = config_of(folder)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(config["num_hidden_layers"])]
    return HUGGING_FACE, config["model_type"], config, {name: tensor(4, 4) for name in names}


def gguf(folder, per_layer=False, split=True):
    config = config_of(folder)
    arch = MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]]
    values = metadata(config, {}, per_layer)
    names = [f"blk.{i}.attn_norm.weight" for i in range(config["num_hidden_layers"])]
    if arch == "gemma3n":
        values |= gemma3n_metadata(config)
    if arch == "deepseek2":
        values = deepseek_metadata(values, config, split)
        names += [f"blk.{i}.exp_probs_b.bias" for i in (1, 2)] if config["model_type"] == "deepseek_v3" else []
        names += [] if split else ["blk.0.attn_kv_b.weight"]
    elif arch == "glm4moe":
        values = glm4_moe_metadata(values, config)
    elif "expert_count" in values and arch != "gpt-oss":
        names += [f"blk.{i}.ffn_gate_inp.weight" for i in range(config["num_hidden_layers"])]
    tensors = {name: tensor(4, 4) for name in ("token_embd.weight", *names)}
    tensors |= {name: Dense(jnp.asarray(x)) for name, x in rope_tensors(config).items()}
    return GGUF, arch, {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in values.items()}, tensors


def demo(name):
    config = fields(name)
    tensors = {f"layers.{i}.attn_norm.weight": tensor(4) for i in range(config["n_layers"])}
    return DEEPSEEK_DEMO, "deepseek_demo", config | {"scale_fmt": "ue8m0"}, tensors


CASES = {
    **{
        f"hf {name}": lambda name=name: hugging_face(f"checkpoints/{name}")
        for name in (
            "llama3_rope",
            "llama_yarn",
            "llama_linear",
            "phi3_longrope",
            "qwen2_window",
            "qwen2_moe",
            "qwen3_moe",
            "mixtral",
            "mistral",
            "gemma2",
            "gemma3_text",
            "gemma3n",
            "granite",
            "smollm3_listed",
            "olmo2",
            "glm4",
            "glm4_moe_groups",
        )
    },
    "hf deepseek v2": lambda: hugging_face("deepseek/v2"),
    "hf deepseek v3": lambda: hugging_face("deepseek/v3"),
    "hf gpt_oss": lambda: hugging_face("gpt_oss/bf16"),
    "gguf llama": lambda: gguf("checkpoints/llama_yarn", per_layer=True),
    "gguf llama3": lambda: gguf("checkpoints/llama3_rope"),
    "gguf linear": lambda: gguf("checkpoints/llama_linear"),
    "gguf mistral": lambda: gguf("checkpoints/mistral"),
    "gguf phi3": lambda: gguf("checkpoints/phi3_longrope"),
    "gguf qwen3_moe": lambda: gguf("checkpoints/qwen3_moe_b"),
    "gguf deepseek v2": lambda: gguf("deepseek/v2", split=False),
    "gguf deepseek v3": lambda: gguf("deepseek/v3"),
    "gguf gpt_oss": lambda: gguf("gpt_oss/bf16"),
    "gguf gemma2": lambda: gguf("checkpoints/gemma2"),
    "gguf gemma3": lambda: gguf("checkpoints/gemma3_text"),
    "gguf gemma3n": lambda: gguf("checkpoints/gemma3n"),
    **{f"gguf {n}": lambda n=n: gguf(f"checkpoints/{n}") for n in ("granite", "smollm3", "olmo2", "glm4", "glm4_moe")},
    "demo v2": lambda: demo("v2"),
    "demo v3": lambda: demo("v3"),
}


def read(dialect, kind, description, tensors):
    return family_of(FAMILIES, dialect, kind).dialects[dialect].config(description, tensors)


def replaced(values, path, value):
    """The same object with another value at a path of keys and indices."""
    key, *rest = path
    values = dict(values) if isinstance(values, dict) else list(values)
    if rest:
        values[key] = replaced(values[key], rest, value)
    elif value is MISSING:
        del values[key]
    else:
        values[key] = value
    return values


def value_at(values, path):
    return reduce(lambda value, key: value[key], path, values)


def paths(values, unread):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (key,)
        if isinstance(value, dict | list) and key not in unread:
            yield from ((key, *path) for path in paths(value, unread))


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_entry_is_named_or_does_not_matter(name):
    dialect, kind, description, tensors = CASES[name]()
    sound, unread = read(dialect, kind, description, tensors), UNREAD | UNREAD_BY.get(kind, set())
    wrong = []
    for path in paths(description, unread):
        key = [key for key in path if isinstance(key, str)][-1].removeprefix(f"{kind}.")
        dotted = ".".join(map(str, path)).removeprefix(f"{kind}.")
        for damage, value in DAMAGES.items():
            where = f"{dotted} {damage}"
            try:
                got = read(dialect, kind, replaced(description, path, value), tensors)
            except InputError as error:
                if "\n" in str(error) or key not in str(error) or len(str(error)) > 400:
                    wrong.append(f"{where}: says {error}")
            except Exception as error:
                wrong.append(f"{where}: {type(error).__name__}: {error}")
            else:
                settings = key in ("rope_parameters", *KINDS, "mlp_only_layers", "scale_fmt")
                empty = settings and damage in ("object", "list")
                truth = damage == "true" and not isinstance(value_at(description, path), bool)
                if (damage in NEVER or truth) and not empty and dotted not in unread:
                    wrong.append(f"{where}: accepted{' and ignored' if got == sound else ''}")
    assert not wrong, "\n".join(wrong)


REFUSED = {  # what must not be believed: a case, entries and their values, and what is said
    "layers in words": ("hf deepseek v3", {"num_hidden_layers": "two"}, "'num_hidden_layers' is 'two', not a whole"),
    "scaling in a word": ("hf deepseek v3", {"rope_parameters": "yarn"}, "'rope_parameters' is 'yarn', not a JSON"),
    "old scaling in a word": (
        "hf deepseek v3",
        {"rope_parameters": MISSING, "rope_scaling": "yarn"},
        "'rope_scaling' is 'yarn', not a JSON",
    ),
    "a scaling that is unknown": (
        "hf deepseek v2",
        {"rope_parameters/rope_type": "linear"},
        "rope scaling 'linear' is not supported; 'rope_type' can be default, yarn",
    ),
    "layers without end": ("hf deepseek v3", {"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000"),
    "more layers than tensors": ("hf mistral", {"num_hidden_layers": 9999}, "is 9999, but there are 2 tensors only"),
    "more experts chosen than there are": (
        "hf deepseek v2",
        {"num_experts_per_tok": 9},
        "more than 'n_routed_experts'",
    ),
    "more chosen than the groups have": ("hf deepseek v3", {"num_experts_per_tok": 5}, "the 4 experts in 2 groups"),
    "groups that are not equal": ("hf deepseek v3", {"n_group": 3}, "8 experts .* are not 3 equal groups"),
    "groups without a second best": ("hf deepseek v3", {"n_group": 8}, "not 8 equal groups .* of 2 or more"),
    "more groups chosen than there are": (
        "hf deepseek v2",
        {"topk_group": 5},
        "'topk_group' is 5, more than",
    ),
    "rotary pairs and a half": (
        "hf deepseek v3",
        {"qk_rope_head_dim": 7},
        "embeddings of 7 .*'qk_rope_head_dim'",
    ),
    "half of the rotary part": (
        "hf deepseek v3",
        {"rope_parameters/partial_rotary_factor": 0.5},
        "'partial_rotary_factor' is not supported",
    ),
    "dense layers between": ("hf deepseek v2", {"moe_layer_freq": 2}, "'moe_layer_freq' is 2"),
    "another score": ("hf deepseek v3", {"scoring_func": "tanh"}, "'scoring_func' is 'tanh', not one of softmax"),
    "another way to choose": ("hf deepseek v3", {"topk_method": "luck"}, "'topk_method' is 'luck', not one of"),
    "another activation": ("hf gpt_oss", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "a scaling of bools": ("hf llama3_rope", {"rope_parameters/factor": True}, "'factor' is True, not a number"),
    "a band upside down": ("hf llama3_rope", {"rope_parameters/low_freq_factor": 5.0}, "5 is not below 'high_freq_f"),
    "heads that do not share": ("hf gpt_oss", {"num_key_value_heads": 3}, "8 query heads cannot share 3"),
    "no room for a head": ("hf mistral", {"num_attention_heads": 64, "head_dim": MISSING}, "'head_dim' is 0"),
    "heads of a gigabyte": ("hf mistral", {"num_attention_heads": 16384, "head_dim": 16384}, "'head_dim' is 16384"),
    "a layer type too few": ("hf gpt_oss", {"layer_types": ["full_attention"]}, "'layer_types' is .* not a list of 3"),
    "one of two experts": ("hf mixtral", {"num_local_experts": 1}, "2, more than 'num_local_experts', which is 1"),
    "no architecture": ("gguf llama", {"general.architecture": MISSING}, "'general.architecture' is missing"),
    "a number of an architecture": ("gguf llama", {"general.architecture": 1}, "'general.architecture' is 1, not one"),
    "no heads": ("gguf mistral", {"llama.attention.head_count": 0}, "'attention.head_count' is 0, not a whole number"),
    "a width in words": ("gguf mistral", {"llama.embedding_length": "x"}, "'embedding_length' is 'x', not a whole"),
    "heads of a layer too few": ("gguf llama", {"llama.attention.head_count": [4]}, "has 1 values for 2 layers"),
    "no width": ("gguf llama", {"llama.feed_forward_length": 0}, "'feed_forward_length' of layer 0 is missing or 0"),
    "a layer without heads": ("gguf llama", {"llama.attention.head_count_kv/1": 0}, "'attention.head_count_kv' is"),
    "layers that do not share": ("gguf llama", {"llama.attention.head_count_kv/1": 3}, "4 query heads cannot share 3"),
    "an odd rotation": (
        "gguf mistral",
        {"llama.rope.dimension_count": 7},
        "'rope.dimension_count' is 7, which",
    ),
    "too much rotation": (
        "gguf mistral",
        {"llama.rope.dimension_count": 18},
        "is 18, more than 'attention.k",
    ),
    "a router without experts": ("gguf qwen3_moe", {"qwen3moe.expert_count": 0}, "'expert_count' is missing or 0"),
    "more experts used": ("gguf qwen3_moe", {"qwen3moe.expert_used_count": 9}, "is 9, more than 'expert_count'"),
    "groups in a file": ("gguf deepseek v3", {"deepseek2.expert_group_count": 3}, "not 3 equal groups"),
    "experts without a sigmoid": ("gguf glm4_moe", {"glm4moe.expert_gating_func": 1}, "is 1, not 2 .sigmoid."),
    "values of another size": ("gguf granite", {"granite.attention.value_length": 9}, "'attention.value_length' 9 is"),
    "layers that only predict": ("gguf glm4_moe", {"glm4moe.nextn_predict_layers": 2}, "_layers' is 2, not a whole"),
    "layers of no kind": ("hf smollm3_listed", {"no_rope_layers": [1]}, "'no_rope_layers' is .1., not a list of 2"),
    "a window": ("hf smollm3_listed", {"use_sliding_window": True, "sliding_window": 8}, "'use_sliding_window' is not"),
    "a field of no ModelArgs": ("demo v3", {"n\nheads": 1}, r"'n\\nheads' is not a field of the demo's ModelArgs"),
    "text in words": ("hf gemma3_text", {"text_config": "x"}, "'text_config' is 'x', not a JSON object"),
    "one rope for two kinds": (
        "hf gemma3_text",
        {"rope_parameters": {"rope_type": "default"}},
        "'rope_type' is no kind of layer; there have to be settings for 'full_attention' and for",
    ),
    "a rope of one kind": (
        "hf gemma3_text",
        {"rope_parameters/full_attention/factor": MISSING},
        "full_attention: rope_parameters: rope scaling 'linear' without 'factor'",
    ),
    "every token at once": ("hf gemma3_text", {"use_bidirectional_attention": True}, "is not supported"),
    "text nowhere": ("hf gemma3n", {"model_type": "gemma3n"}, "'text_config' is missing"),
    "keys from nowhere": (
        "hf gemma3n",
        {"num_kv_shared_layers": 5},
        r"layer 1 shares keys and values, but no layer of its type \('layer_types'\) is before layer 1",
    ),
    "nothing left": ("hf gemma3n", {"activation_sparsity_pattern/0": 1.0}, "not a list of 6 numbers from 0 to below 1"),
    "another GELU": ("hf gemma2", {"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu', not one of gelu_py"),
    "no window and a half": ("gguf gemma2", {"gemma2.attention.sliding_window_pattern": 0.5}, "is 0.5, not a whole"),
    "fields: groups": ("demo v3", {"n_expert_groups": 3}, r"not 3 equal groups \('n_expert_groups'\)"),
    "fields: chosen groups": ("demo v3", {"n_limited_groups": 5}, "'n_limited_groups' is 5, more than 'n_expert_gr"),
    "fields: chosen experts": ("demo v2", {"n_activated_experts": 9}, "more than 'n_routed_experts', which is 8"),
    "fields: layers": ("demo v3", {"n_layers": 10**9}, "'n_layers' is 1000000000, not a whole number"),
    "fields: scales": ("demo v3", {"scale_fmt": "e8m23"}, "'scale_fmt' is 'e8m23', not one of ue8m0, float"),
    "fields: an odd rotation": ("demo v3", {"qk_rope_head_dim": 7}, "rotary embeddings of 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_itself_is_refused(name):
    case, changes, message = REFUSED[name]
    dialect, kind, description, tensors = CASES[case]()
    for path, value in changes.items():
        keys = [int(key) if key.isdigit() else key for key in path.split("/")]
        description = replaced(description, keys, value)
    with pytest.raises(InputError, match=message) as error:
        read(dialect, kind, description, tensors)
    assert "\n" not in str(error.value)


FACTORS = "rope_factors_long.weight"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (None, f"tensor '{FACTORS}' is missing"),
        (np.ones(5), rf"tensor '{FACTORS}' has shape \[5\], expected \[6\]"),
        (np.zeros(6), f"tensor '{FACTORS}' makes rotary frequencies that are not finite"),
        (np.full(6, np.nan), f"tensor '{FACTORS}' makes rotary frequencies that are not finite"),
    ],
)
def test_factors_that_are_no_frequencies_are_refused(factors, message):
    dialect, kind, description, tensors = gguf("checkpoints/phi3_longrope")
    del tensors[FACTORS]
    tensors |= {} if factors is None else {FACTORS: Dense(jnp.asarray(factors, jnp.float32))}
    with pytest.raises(InputError, match=message):
        read(dialect, kind, description, tensors)


def test_an_architecture_is_text():
    with pytest.raises(InputError, match=r"'general.architecture' is \[1, 2\], not text"):
        assert GGUFFile(Path("x.gguf"), {"general.architecture": [1, 2]}, {}).architecture


@pytest.mark.parametrize("value", [0, 13, 10**9, 2**32 - 1])
@pytest.mark.parametrize("number", range(7))
def test_a_ggml_files_damaged_numbers_are_one_line(tmp_path, number, value):
    """These files have seven numbers for metadata, three of which say nothing of the model's sizes."""
    path = tmp_path / "model.bin"
    write(path, "ggjt 3", Tiny(layers=1, kv_heads=4))
    data = bytearray(path.read_bytes())
    data[8 + 4 * number : 12 + 4 * number] = struct.pack("<I", value)
    path.write_bytes(data)
    if number in (2, 5, 6):  # n_mult, n_rot ("obsolete") and ftype
        assert open_checkpoint(path).config.hidden_size == 64
        return
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
