"""Writes tests/golden/gptq_errors.json: the error of products that gptqmodel and AutoAWQ leave on the matrices below.

Run where torch, transformers, gptqmodel 7.7.0 and autoawq 0.2.9 are installed (the last two with --no-deps; jaxllm is
not needed):

    python tests/reference/gptq_goldens.py

The tests import `problem` and `error` from here, so that both sides see the same numbers; the golden's entry for zeros
tells if they did not. gptqmodel runs in the columns' order, as by default (groups by importance, and columns within
them), and with the settings that leave the smallest error here (`desc_act`, `static_groups`, a search for each grid).
"""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np

OUT, IN, TOKENS = 64, 256, 1024
CASES = [(4, 128, False), (4, 128, True), (4, 32, False), (3, 64, True), (2, 32, False), (8, 128, False)]
AWQ_CASES = [(4, 128), (4, 32)]
ORDERS: dict[str, dict[str, Any]] = {
    "in order": {"desc_act": False, "act_group_aware": False},
    "default": {"desc_act": False, "act_group_aware": True},
    "best": {"desc_act": True, "static_groups": True, "mse": 2.4},
}


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix float32 `[OUT, IN]` and inputs float32 `[TOKENS, IN]`: correlated, of various sizes, a few large."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((IN // 4, IN)) * np.exp(0.5 * rng.standard_normal(IN)) / np.sqrt(IN / 4)
    x = rng.standard_normal((TOKENS, IN // 4)) @ mix + 0.3 * rng.standard_normal((TOKENS, IN))
    x *= np.exp(0.7 * rng.standard_normal(IN))
    x[:, rng.choice(IN, 3, replace=False)] *= 10
    return np.float32(0.02 * rng.standard_t(5, (OUT, IN))), x.astype(np.float32)


def error(x: np.ndarray, w: np.ndarray, rounded: np.ndarray) -> float:
    """`|X (W - Q)^T|^2 / |X W^T|^2`."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    return float(np.square(x @ (w - rounded).T).sum() / np.square(x @ w.T).sum())


class Stubs:
    """Imports what gptqmodel names at the top of its files and never calls here."""

    names = frozenset(["pcre", "logbar", "device_smi", "tokenicer", "defuser", "datasets", "pulp", "peft"])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec)
        module.__name__ = spec.name
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def by_gptqmodel(w: np.ndarray, x: np.ndarray, bits: int, group: int, symmetric: bool, order: str) -> np.ndarray:
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = torch.nn.Linear(*w.shape[::-1], bias=False)
    linear.weight.data = torch.from_numpy(w.copy())
    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, damp_percent=0.01, **ORDERS[order])
    quantizer = GPTQ(linear, config)
    quantizer.quantizer.configure(perchannel=True)
    quantizer.add_batch(torch.from_numpy(x)[None], None)
    return quantizer.quantize()[0].detach().numpy()


def by_autoawq(w: np.ndarray, x: np.ndarray, bits: int, group: int, clip: bool) -> np.ndarray:
    """The matrix that meets the undivided inputs, with AutoAWQ's factors, and its search for where to clip."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    quantizer = object.__new__(AwqQuantizer)
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point = bits, group, True
    quantizer.duo_scaling, quantizer.max_chunk_memory, quantizer.n_parallel_calib_samples = True, 1 << 30, None
    linear, inputs = torch.nn.Linear(*w.shape[::-1], bias=False), torch.from_numpy(x)
    linear.weight.data = torch.from_numpy(w.copy())
    # AutoAWQ restores the matrix from this after each attempt; on a CPU, "moved" values would be the changed ones.
    linear.state_dict = lambda: {"weight": torch.from_numpy(w.copy())}
    scales = quantizer._search_best_scale(torch.nn.ModuleList([linear]), linear, [linear], inputs)[2]
    scaled = torch.from_numpy(w) * scales
    if clip:
        limit = quantizer._compute_best_clip(scaled, inputs / scales)
        scaled = scaled.reshape(*limit.shape[:2], -1).clamp(-limit, limit).reshape(scaled.shape)
    return (quantizer.pseudo_quantize_tensor(scaled)[0] / scales).numpy()


def main() -> None:
    sys.meta_path.insert(0, Stubs())
    golden: dict[str, Any] = {}
    for seed in (0, 1):
        w, x = problem(seed)
        golden[f"zeros {seed}"] = float(np.square(x.astype(np.float64) @ w.T.astype(np.float64)).sum())
        for bits, group, symmetric in CASES:
            name = f"gptq {seed} {bits} {group} {symmetric}"
            golden[name] = {o: error(x, w, by_gptqmodel(w, x, bits, group, symmetric, o)) for o in ORDERS}
        for bits, group in AWQ_CASES:
            kinds = {"scaled": False, "clipped": True}
            golden[f"awq {seed} {bits} {group}"] = {
                k: error(x, w, by_autoawq(w, x, bits, group, clip)) for k, clip in kinds.items()
            }
    path = Path(__file__).resolve().parents[1] / "golden" / "gptq_errors.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
