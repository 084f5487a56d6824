"""Writes tests/golden/exports/outcome.json: what other packages make of what jaxllm/checkpoint/exports.py writes.

In jaxllm's environment, then in one with torch (see quantized_goldens.py for what it has to hold; loading models takes
optimum, mlx-lm and what gptqmodel imports besides, PyPcre, logbar, tokenicer, device-smi and defuser, too):

    python tests/reference/exports_check.py write DIR
    python tests/reference/exports_check.py check DIR

`write` puts two things into DIR for each type. cases/ has one matrix or stack (that of tests/test_exports.py), with its
config and with `expected`, the matrix as jaxllm decodes it. models/ has a tiny random Llama of this type, in which one
matrix stays plain, and beside it the same one in float32; both are written by `exports`.

`check` decodes each case with the package that owns the format, and loads each model with transformers or mlx-lm. The
outcome:

    sha256   of each tensor of a case; tests/test_exports.py asserts that these bytes are still written
    decoded  the package, and the largest difference to `expected`
    logits   the largest difference between the two Llamas, as a part of the largest logit: as the config declares it;
             and "unrounded", with activations not rounded and sums in float32. LLM.int8 always rounds activations.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUTCOME = HERE.parent / "golden" / "exports" / "outcome.json"
SHAPE, SEED = (64, 256), 15  # as in tests/test_exports.py
HIDDEN, WIDTH, VOCAB = 256, 512, 128
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LEFT_OUT = "model.layers.0.self_attn.o_proj"  # this matrix stays float32, and the config has to say so
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}


def write(root: Path) -> None:
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    import jax
    import numpy as np
    from exports_cases import FORMS, MAKERS, STACKED
    from quantized_writers import write_safetensors

    from jaxllm.formats.dense import Dense

    (root / "cases").mkdir(parents=True)
    plain = FORMS["huggingface", "float32"]

    def decoded(weight: Any) -> Any:
        return np.asarray(jax.tree.map(np.asarray, weight).dequantize())

    def save(folder: Path, tensors: dict[str, Any], said: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps(LLAMA | said))

    for (container, kind), form in FORMS.items():
        make, name = MAKERS[container, kind], f"{container}-{kind}"
        weight = make(np.random.default_rng(SEED), (2, *SHAPE) if (container, kind) == STACKED else SHAPE)
        write_safetensors(
            root / "cases" / f"{name}.safetensors", form.tensors("m", weight) | {"expected": decoded(weight)}
        )
        said = form.declaration(["lm_head"])
        (root / "cases" / f"{name}.json").write_text(json.dumps(said))
        if (container, kind) == STACKED:
            continue
        rng = np.random.default_rng(SEED)
        rest = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
        others = {f"{module}.weight": rng.standard_normal(shape, np.float32) for module, shape in rest.items()}
        norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
        others |= {f"{module}.weight": np.ones(HIDDEN, np.float32) for module in norms}
        ours, same, groups = dict(others), dict(others), {}
        for short, shape in LINEAR.items():
            module, weight = f"model.layers.0.{short}", make(rng, shape)
            dense = plain.tensors(module, Dense(decoded(weight)))
            same |= dense
            if module == LEFT_OUT:
                ours |= dense
                continue
            ours |= form.tensors(module, weight)
            groups |= {module: weight.group} if hasattr(weight, "group") else {}
        save(root / "models" / name, ours, form.declaration(["lm_head", LEFT_OUT], groups))
        save(root / "models" / f"{name}-plain", same, {})


def decode(kind: str, tensors: dict[str, Any], said: dict[str, Any]) -> tuple[str, Any]:
    """The package that decodes a case, and its matrix."""
    import quantized_goldens as packages

    if kind.startswith("gptq"):
        return "gptqmodel", gptq(tensors, said)
    if kind == "awq":
        return "autoawq", packages.awq_decode(tensors, said)
    if kind in ("nf4", "fp4"):
        return "bitsandbytes", packages.bnb4_decode(tensors, said)
    if kind == "llm_int8":
        return "bitsandbytes", packages.bnb8_decode(tensors, said)
    if kind == "fp8_block":
        return "transformers", packages.fp8_decode(tensors, said)
    if kind == "mxfp4_experts":
        named = {f"gate_up_proj{name}": tensor for name, tensor in tensors.items()}
        return "transformers", packages.mxfp4_decode(named, said)
    if "group_size" in said:
        return "mlx", packages.mlx_decode(tensors, {k: said[k] for k in ("group_size", "bits", "mode")})
    if kind == "int4":  # float16 scales would make the arithmetic float16
        tensors = tensors | {"weight_scale": tensors["weight_scale"].float()}
    decoder = {"mxfp4": "ct_fp4_decode", "nvfp4": "ct_fp4_decode", "mxfp8": "ct_mxfp8_decode"}.get(kind, "ct_decode")
    return "compressed-tensors", getattr(packages, decoder)(tensors, said)


def gptq(tensors: dict[str, Any], said: dict[str, Any]) -> Any:
    """gptqmodel's torch kernel, which reads version 2; its own function converts version 1 to that."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    sizes = {"out_features": tensors["scales"].shape[1], "in_features": len(tensors["g_idx"])}
    layer = TorchLinear(
        **{name: said[name] for name in ("bits", "group_size", "sym", "desc_act")}, **sizes, format=FORMAT.GPTQ_V2
    )
    for name, tensor in tensors.items():
        setattr(layer, name, tensor.float() if name == "scales" else tensor.clone())
    if said["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits=said["bits"], pack_dtype=torch.int32)
    return layer.dequantize_weight().T


def logits(folder: Path, dtype: str) -> Any:
    """Of sixteen tokens, by mlx-lm or by transformers."""
    import torch

    if folder.name.startswith("mlx"):
        import mlx.core as mx
        import numpy as np
        from mlx_lm.utils import load_model

        found = load_model(folder)[0](mx.arange(1, 17)[None])
        return torch.from_numpy(np.array(found.astype(mx.float32)))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    with torch.no_grad():
        return model(torch.arange(1, 17)[None]).logits.float()


def apart(got: Any, want: Any) -> float:
    return float(f"{((got - want).abs().max() / want.abs().max()).item():.1e}")


def unrounded(path: Path) -> bool:
    """Changes a config so that only weights are rounded. Whether that is possible and makes a difference."""
    config = json.loads(path.read_text())
    said = config.get("quantization_config", {})
    groups = [group for group in said.get("config_groups", {}).values() if group["input_activations"]]
    for group in groups:
        group["input_activations"] = None
    if said.get("load_in_4bit"):
        said["bnb_4bit_compute_dtype"] = "float32"
    path.write_text(json.dumps(config))
    return bool(groups) or bool(said.get("load_in_4bit"))


def check(root: Path) -> dict[str, Any]:
    import quantized_goldens as packages
    import torch
    from safetensors import safe_open

    sys.meta_path.append(packages.Stubs())
    torch.set_num_threads(1)
    sums, decoded, compared = {}, {}, {}
    for path in sorted((root / "cases").glob("*.safetensors")):
        kind = path.stem.partition("-")[2]
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = tensors.pop("expected")
        flat = {name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
        sums[path.stem] = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in flat.items()}
        [said, *_] = json.loads(path.with_suffix(".json").read_text()).values() or [None]
        if said is None:
            continue
        bare = {name.removeprefix("m").removeprefix("."): tensor for name, tensor in tensors.items()}
        package, got = decode(kind, bare, said)
        difference = (got.float() - expected).abs().max().item()
        decoded[path.stem] = {"by": f"{package} {version(package)}", "difference": difference}
        print(path.stem, decoded[path.stem], flush=True)
    for folder in sorted((root / "models").glob("*-plain")):
        ours = folder.with_name(folder.name.removesuffix("-plain"))
        # compressed-tensors decodes these in bfloat16 only.
        dtype = "bfloat16" if ours.name.endswith(("-mxfp4", "-nvfp4", "-mxfp8")) else "float32"
        want = logits(folder, dtype)
        compared[ours.name] = {"as declared": apart(logits(ours, dtype), want)}
        if unrounded(ours / "config.json"):
            compared[ours.name]["unrounded"] = apart(logits(ours, dtype), want)
        print(ours.name, compared[ours.name], flush=True)
    loaded_by = ", ".join(f"{package} {version(package)}" for package in ("transformers", "optimum", "mlx-lm"))
    return {"loaded_by": loaded_by, "sha256": sums, "decoded": decoded, "logits": compared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("write", "check"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.step == "write":
        write(args.folder)
        return
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    outcome = check(args.folder)
    OUTCOME.parent.mkdir(exist_ok=True)
    OUTCOME.write_text(json.dumps(outcome, indent=1) + "\n")


if __name__ == "__main__":
    main()
