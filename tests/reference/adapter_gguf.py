"""Writes tests/golden/adapters/gguf: adapters as llama.cpp's converter writes them, and llama.cpp's logits.

Run with a Python that has torch, transformers, gguf and safetensors; given the sources of llama.cpp (those in the
source package of llama-cpp-python 0.3.36 were used) and the Python of an environment that has llama-cpp-python:

    python tests/reference/adapter_gguf.py LLAMA_CPP PEER_PYTHON

Of each adapter there are NAME.gguf and NAME.npy: float32 [2, T, V], logits for the `tokens` of the base's golden.npz,
where the base is what tests/hf_to_gguf.py writes, in float32. The converter knows no stacks of experts, but llama.cpp
does: that adapter is mlx-lm's with the names of GGUF files, and has to give mlx-lm's logits.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))
from hf_to_gguf import convert  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROOT = GOLDEN / "adapters" / "gguf"
NAMES = ("second", "ends")

PEER = """
import sys
import numpy as np
from llama_cpp import Llama
base, adapter, tokens, out = sys.argv[1:]
model = Llama(base, lora_path=adapter, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
logits = []
for row in np.load(tokens)["tokens"]:
    model.reset()
    model.eval(row.tolist())
    logits.append(np.array(model.scores[: len(row)], np.float32))
np.save(out, np.stack(logits))
"""


def logits_of(peer: str, base: Path, made: Path) -> np.ndarray:
    """llama.cpp's logits of a directory with an adapter, which are written next to the adapter."""
    config, out = json.loads((base / "config.json").read_text()), made.with_suffix(".npy")
    more = {"tokenizer.ggml.model": "none", "vocab_size": config["vocab_size"]}
    if "shared_expert_intermediate_size" in config:
        more["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    with tempfile.TemporaryDirectory() as folder:
        convert(base, Path(folder, "base.gguf"), more_metadata=more)
        subprocess.run([peer, "-c", PEER, f"{folder}/base.gguf", made, base / "golden.npz", out], check=True)
    return np.load(out)


def write_experts(adapter: Path, made: Path) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, 2)
    parameters = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    writer = gguf.GGUFWriter(made, "qwen2moe")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, parameters["scale"] * parameters["rank"])
    for name, x in load_file(adapter / "adapters.safetensors").items():
        module, _, side = name.rpartition(".")
        target = names.get_name(module.replace("switch_mlp", "experts") + ".weight", (".weight",))
        writer.add_tensor(f"{target}.{side}", np.ascontiguousarray(x if x.ndim == 3 else x.T))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(sources: str, peer: str) -> None:
    ROOT.mkdir(exist_ok=True)
    for name in NAMES:
        adapter, made = GOLDEN / "adapters" / name, ROOT / f"{name}.gguf"
        base = GOLDEN / json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        command = [sys.executable, f"{sources}/convert_lora_to_gguf.py", "--base", base, "--outtype", "f32"]
        subprocess.run([*command, "--outfile", made, adapter], check=True, env={"PYTHONPATH": f"{sources}/gguf-py"})
        apart = np.abs(logits_of(peer, base, made) - np.load(adapter / "golden.npz")["logits"]).max()
        print(f"{name}: at most {apart:.2g} from peft's logits")  # 7.7e-06 and 6.7e-06
    adapter, made = GOLDEN / "adapters" / "mlx" / "experts", ROOT / "experts.gguf"
    base = GOLDEN / json.loads((adapter / "adapter_config.json").read_text())["model"]
    write_experts(adapter, made)
    apart = np.abs(logits_of(peer, base, made) - np.load(adapter / "logits.npy")).max()
    print(f"experts: at most {apart:.2g} from mlx-lm's logits")


if __name__ == "__main__":
    main(*sys.argv[1:])
