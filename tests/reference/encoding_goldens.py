"""Writes tests/golden/encodings: what other packages make of one float matrix, in each of their formats.

    exact.npz    codes and scales that ours have to equal bit for bit
    errors.json  {type: {package: the root mean square error relative to that of zeros}}

Run with Python 3.11 and `torch bitsandbytes compressed-tensors mlx mlx-cpu torchao safetensors tokenizers hqq`. The
errors of mistral.rs come from its wheel, which needs another Python: `--mistralrs PYTHON` names one that has it. That
one quantizes a tiny model that holds the matrix, and writes it as UQFF.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parents[1] / "golden" / "encodings"
ROWS, COLS = 128, 192
FEW = slice(0, 16)  # rows that are enough where rows are encoded on their own
ISQ = ("hqq4", "hqq8", "afq2", "afq3", "afq4", "afq6", "afq8", "fp8", "f8q8", "mxfp4")
Arrays = dict[str, np.ndarray]


def matrix() -> np.ndarray:
    """float32 `[128, 192]`: rows and columns of different sizes, a row of zeros, a group of equal values. All are
    exact in float16 and in bfloat16, because some packages convert to these first."""
    rng = np.random.default_rng(11)
    size = (0.5 + rng.random((ROWS, 1))) * (0.5 + rng.random(COLS)) * 0.1
    w = np.float32(rng.standard_normal((ROWS, COLS)) * size)
    w = (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    w[np.abs(w) < 2**-13] = 0
    w[3], w[4, :64], w[5, 7] = 0, 0.25, -2
    return w


def error(w: np.ndarray, made: np.ndarray) -> float:
    """The root mean square error, relative to the one of zeros."""
    return float(np.sqrt(np.mean((np.float64(made) - w) ** 2) / np.mean(np.float64(w) ** 2)))


def mlx(w: np.ndarray, exact: Arrays) -> dict[str, float]:
    import mlx.core as mx

    def arrays(name: str, values: mx.array, **options: object) -> tuple[mx.array, ...]:
        parts = mx.quantize(values, **options)
        exact.update({f"{name}.{i}": np.array(part)[FEW] for i, part in enumerate(parts)})
        return parts

    errors = {}
    for bits in (2, 3, 4, 6, 8):
        arrays(f"afq{bits}", mx.array(w), group_size=64, bits=bits)
        half = mx.quantize(mx.array(w).astype(mx.float16), group_size=64, bits=bits)
        made = mx.dequantize(*half, group_size=64, bits=bits).astype(mx.float32)
        errors[f"afq{bits}"] = error(w, np.array(made))
    for mode, group, bits in (("mxfp8", 32, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4)):
        parts = mx.quantize(mx.array(w), group_size=group, bits=bits, mode=mode)
        made = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode).astype(mx.float32)
        errors[mode] = error(w, np.array(made))
    arrays("mxfp8", mx.array(w), group_size=32, bits=8, mode="mxfp8")
    arrays("nvfp4_mlx", mx.array(w), group_size=16, bits=4, mode="nvfp4")
    return errors


def bitsandbytes(w: np.ndarray, exact: Arrays) -> dict[str, float]:
    import bitsandbytes.functional as bnb
    import torch

    errors = {}
    for name in ("nf4", "fp4"):
        codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type=name)
        few = len(range(*FEW.indices(ROWS)))
        exact[f"{name}.codes"] = codes.numpy().reshape(ROWS, COLS // 2)[:few]
        exact[f"{name}.scales"] = state.absmax.numpy().reshape(ROWS, COLS // 64)[:few]
        exact[f"{name}.table"] = state.code.numpy()
        errors[name] = error(w, bnb.dequantize_4bit(codes, state).numpy())
    codes, scales, _ = bnb.int8_vectorwise_quant(torch.from_numpy(w).half())
    exact["int8.values"], exact["int8.scales"] = codes.numpy()[FEW], scales.numpy()[FEW, None]
    errors["int8"] = error(w, codes.numpy() * (scales.numpy()[:, None] / np.float32(127)))
    return errors


def compressed_tensors(w: np.ndarray, exact: Arrays) -> dict[str, float]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    t = torch.from_numpy(w)

    def both(args: QuantizationArgs, group: int, overall: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        grid = t.reshape(ROWS, -1, group)
        scale, zero = calculate_qparams(grid.amin(-1), grid.amax(-1), args, global_scale=overall)
        codes = quantize(t, scale, zero, args, global_scale=overall)
        return codes, scale, dequantize(codes, scale, zero, args, global_scale=overall)

    nv = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    codes, scale, made = both(nv, 16, generate_gparam(t.min(), t.max()))
    exact["nvfp4.values"], exact["nvfp4.scales"] = codes.float().numpy()[FEW], scale.float().numpy()[FEW]
    errors = {"nvfp4": error(w, made.float().numpy())}
    for name, bits, strategy, group in (("int4", 4, "group", 64), ("int8", 8, "channel", COLS)):
        size = {"group_size": group} if strategy == "group" else {}
        errors[name] = error(w, both(QuantizationArgs(num_bits=bits, strategy=strategy, **size), group)[2].numpy())
    return errors


def torch_casts(w: np.ndarray, exact: Arrays) -> dict[str, float]:
    import torch

    t = torch.from_numpy(w)

    def cast(scale: torch.Tensor) -> np.ndarray:
        return (t / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    whole = t.abs().amax() / 448
    exact["fp8.values"], exact["fp8.scales"] = cast(whole)[FEW], whole.reshape(1, 1).numpy()
    blocks = torch.stack([t[:, :128].abs().amax(), t[:, 128:].abs().amax()]) / 448
    exact["fp8_block.values"] = cast(blocks.repeat_interleave(128)[:COLS])
    exact["fp8_block.scales"] = blocks.reshape(1, 2).numpy()
    return {}


def torchao(w: np.ndarray, exact: Arrays) -> dict[str, float]:
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    scales, codes = to_mx(torch.from_numpy(w[FEW]), torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
    exact["mxfp4.scales"], exact["mxfp4.blocks"] = (x.view(torch.uint8).numpy() for x in (scales, codes))
    return {}


def hqq(w: np.ndarray, exact: Arrays) -> dict[str, float]:
    """Groups along axis 0, and along axis 1; also a matrix with errors that do not all shrink to 0."""
    from functools import partial

    import torch
    from hqq.core import optimize
    from hqq.core.quantize import Quantizer

    options = {"lp_norm": 0.7, "beta": 1e1, "kappa": 1.01, "iters": 10}  # mistral.rs's number of steps
    Quantizer.optimize_weights = partial(optimize.optimize_weights_proximal_legacy, opt_params=options)

    def run(name: str, values: np.ndarray, bits: int, axis: int, keep: bool) -> float:
        t = torch.from_numpy(values)
        codes, meta = Quantizer.quantize(t, bits, group_size=64, axis=axis, bitpack=False, device="cpu")
        if keep:
            exact[f"{name}.codes"] = codes.numpy().astype(np.uint8).reshape(values.shape)
            exact[f"{name}.scales"], exact[f"{name}.zeros"] = meta["scale"].numpy(), meta["zero"].numpy()
        return error(values, ((codes - meta["zero"]) * meta["scale"]).reshape(t.shape).numpy())

    errors = {f"hqq{bits}": run(f"hqq{bits}", w, bits, 0, bits == 4) for bits in (2, 3, 4, 8)}
    errors["hqq4 along in"] = run("hqq4 along in", w[:32], 4, 1, True)
    return errors | {"hqq4 of large values": run("hqq4 of large values", w * 64, 4, 0, True)}


def write_model(w: np.ndarray, folder: Path) -> None:
    """A Llama whose down_proj is `w`."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    vocab = 64
    square = {f"self_attn.{name}_proj": (ROWS, ROWS) for name in "qkvo"}
    shapes = square | {"mlp.gate_proj": (COLS, ROWS), "mlp.up_proj": (COLS, ROWS)}
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.0.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {"model.layers.0.mlp.down_proj": torch.from_numpy(w)}
    tensors |= {name: torch.randn(vocab, ROWS, generator=generator) for name in ("model.embed_tokens", "lm_head")}
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    tensors |= {name: torch.ones(ROWS) for name in norms}
    save_file({f"{name}.weight": t.bfloat16() for name, t in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": ROWS,
        "intermediate_size": COLS,
        "vocab_size": vocab,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{i}": i for i in range(vocab)}
    Tokenizer(models.WordLevel(words, "w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1", "chat_template": "x"}))


# What another Python runs. It writes the file, then complains that it cannot run what it wrote.
WRITE_UQFF = """
import sys
from mistralrs import Runner, Which
model, target, type = sys.argv[1:]
Runner(which=Which.Plain(model_id=model, write_uqff=target), in_situ_quant=type)
"""


def mistralrs(w: np.ndarray, python: str) -> dict[str, float]:
    from safetensors.torch import load_file

    errors = {}
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        write_model(w, model)
        for name in ISQ:
            target = Path(folder, name)
            target.mkdir()
            subprocess.run([python, "-c", WRITE_UQFF, model, target / "x.uqff", name], capture_output=True, check=False)
            tensors = load_file(target / "x-0.uqff")
            prefix = "model.layers.0.mlp.down_proj.weight"
            parts = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
            errors[name] = error(w, DECODERS[name.rstrip("0123456789") if name != "f8q8" else name](parts))
    return errors


def decode_hqq(parts: dict) -> np.ndarray:
    packed = parts[""].numpy()
    codes = packed if parts[".bits"].item() == 8 else np.concatenate([packed >> 4, packed & 15])
    return ((codes - parts[".zeros"].numpy()) * parts[".scales"].numpy()).reshape(ROWS, COLS)


def decode_afq(parts: dict) -> np.ndarray:
    bits, words = parts[".bits"].item(), parts[""].numpy()
    stream = np.unpackbits(words.view(np.uint8).reshape(ROWS, -1), axis=1, bitorder="little").reshape(ROWS, COLS, bits)
    codes = (stream << np.arange(bits, dtype=np.uint8)).sum(-1)
    scales, biases = (np.repeat(parts[name].float().numpy(), 64, 1) for name in (".scales", ".biases"))
    return codes * scales + biases


def decode_fp8(parts: dict) -> np.ndarray:
    return (parts[""].float() * parts[".dequant_w_scale"]).numpy()


def decode_f8q8(parts: dict) -> np.ndarray:
    import torch

    blocks = parts[""].reshape(-1, 33)
    scales = blocks[:, :1].view(torch.float8_e4m3fn).float() / 448
    return (blocks[:, 1:].view(torch.int8) * scales).numpy().reshape(ROWS, COLS)


def decode_mxfp4(parts: dict) -> np.ndarray:
    packed, scales = parts[""].numpy(), parts[".scales"].numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(ROWS, COLS)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    return table[codes] * np.repeat(2.0 ** (scales.astype(np.float32) - 127), 32, axis=1)


DECODERS = {"hqq": decode_hqq, "afq": decode_afq, "fp": decode_fp8, "f8q8": decode_f8q8, "mxfp": decode_mxfp4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mistralrs", required=True, metavar="PYTHON", help="a Python that has mistralrs 0.9.5")
    args = parser.parse_args()
    w, exact, errors = matrix(), {}, {}
    found = {package.__name__: package(w, exact) for package in (mlx, bitsandbytes, compressed_tensors, torchao, hqq)}
    torch_casts(w, exact)
    found["mistralrs"] = mistralrs(w, args.mistralrs)
    for package, values in found.items():
        for name, value in values.items():
            errors.setdefault(name, {})[package] = float(f"{value:.5g}")
    ROOT.mkdir(exist_ok=True)
    np.savez_compressed(ROOT / "exact.npz", **exact)
    (ROOT / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
