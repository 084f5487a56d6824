"""The files of DeepSeek's inference demo: read on any mesh, written and read back bit for bit; FP8 made plain."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from deepseek_numpy import E4M3, Transformer, demo_names, load, model_args, read_safetensors, weight_dequant
from safetensors.numpy import save_file

import jaxllm
from jaxllm.checkpoint.demo import demo_tensors
from jaxllm.checkpoint.placing import FileArray, JoinedArray, _read
from jaxllm.convert import DEMO_CONFIG, convert

CHECKPOINTS = Path(__file__).parent / "golden" / "deepseek"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
SAYABLE = ("v2", "v2_lite", "v3", "v3_no_q_lora")  # with ModelArgs
UNSAYABLE = {"v3_half_rope": "interleaved", "v3_plain_rope": "rms_norm_eps", "v3_unlike_demo": "norm_topk_prob, rope"}
CUT = {"embed": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "head": 0}  # convert.py
FP8_SIZES = {"dim": 256, "rows": 512}


def demo_files(path, tensors, n, experts=8):
    """What the demo's convert.py would write of tensors by the demo's names, told once more."""
    path.mkdir(parents=True, exist_ok=True)
    files = [{} for _ in range(n)]
    for name, x in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            files[int(parts[-3]) // (experts // n)][name] = x
            continue
        axis = CUT.get(parts[-2])
        for i, file in enumerate(files):
            file[name] = x if axis is None else np.ascontiguousarray(np.split(x, n, axis)[i])
    for i, file in enumerate(files):
        save_file(file, path / f"model{i}-mp{n}.safetensors")
    return path


def fields(name):
    """ModelArgs of a golden checkpoint."""
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    args, ours = model_args(config), ("block", "norm_eps", "mscale_all_dim", "norm_topk_prob", "rope_interleave")
    given = {key: value for key, value in vars(args).items() if key not in (*ours, "masked_score")}
    sizes = {"vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size"}
    sizes |= {"moe_inter_dim": "moe_intermediate_size", "n_shared_experts": "n_shared_experts"}
    return given | {key: config[theirs] for key, theirs in sizes.items()}


def made(tmp_path, name="v3", n=2, **changes):
    tensors, _ = load(CHECKPOINTS / name)
    path = demo_files(tmp_path / f"{name}-{n}", tensors, n)
    (path / "config_671B.json").write_text(json.dumps(fields(name) | changes))
    return path


def raw(path):
    """Every tensor as its dtype, shape and bytes, a list for each file."""
    files = sorted(path.glob("*.safetensors"))
    return [{n: (t["dtype"], t["shape"], t["data"]) for n, t in safetensors.deserialize(f.read_bytes())} for f in files]


def whole(path):
    return {name: t for file in raw(path) for name, t in file.items()}


def run(*args, module="jaxllm.convert"):
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], capture_output=True, text=True, timeout=100)


MESHES = [(1, "tp=1"), (2, "tp=1"), (4, "tp=1"), (1, "tp=2"), (2, "tp=2,ep=2"), (4, "tp=2"), (4, "tp=2,ep=2")]
CASES = [("v3", n, mesh) for n, mesh in MESHES] + [("v3_no_q_lora", 4, "tp=2,ep=2"), ("v2", 2, "tp=2")]


@pytest.mark.parametrize(("name", "n", "mesh"), CASES)
def test_logits_are_those_of_transformers_whatever_n_was(tmp_path, name, n, mesh):
    golden = np.load(CHECKPOINTS / name / "golden.npz")
    model = jaxllm.load(made(tmp_path, name, n), mesh=mesh, dtype="float32", weights="packed", progress=False)
    np.testing.assert_allclose(model.logits(golden["tokens"]), golden["logits"], atol=1e-3)


def fp8_model(seed=0):
    """V3 by Hugging Face's names with FP8 matrices, all that the demo cuts of 2 blocks of 128 or more."""
    rng, config = np.random.default_rng(seed), json.loads((CHECKPOINTS / "v3_fp8" / "config.json").read_text())
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 128}
    sizes |= {"kv_lora_rank": 136, "qk_nope_head_dim": 56, "v_head_dim": 64, "num_hidden_layers": 2}
    config |= sizes | {"qk_head_dim": 64}
    e, h, c, q = 256, 4, 136, 128
    attn = {"q_a_proj": (q, e), "q_b_proj": (h * 64, q), "kv_a_proj_with_mqa": (c + 8, e), "kv_b_proj": (h * 120, c)}
    # 4 heads of 56 + 64 rows are no whole blocks; with 8 key rows more they are
    config["v_head_dim"], attn["kv_b_proj"], attn["o_proj"] = 72, (h * 128, c), (e, h * 72)
    config["v_head_dim"], config["qk_nope_head_dim"] = 64, 64
    attn |= {"kv_b_proj": (h * 128, c), "o_proj": (e, h * 64), "q_b_proj": (h * 72, q)}
    raise NotImplementedError
