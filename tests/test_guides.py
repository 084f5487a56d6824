"""The guides of docs/, followed: a family and a format from outside the package work from file to answer."""

import json

import numpy as np
import pytest
import tiny_hf
from compiled import step_by_step
from covering import some
from quantized_writers import read_safetensors, write_safetensors
from toy_family import RIPPLE, RippleConfig
from toy_format import declared_ternary

import jaxllm
from jaxllm.checkpoint.declared import READERS
from jaxllm.models.families import FAMILIES

CONFIG = {
    "model_type": "ripple",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layers": "fsnrs",
    "sliding_window": 5,
    "residual_scale": 0.7,
    "score_cap": 3.0,
    "logit_cap": 5.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def tensors(rng):
    c = RippleConfig.from_hf(CONFIG)
    hidden, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"embedding": (c.vocab_size, hidden), "norm": (hidden,)}
    for i, kind in enumerate(c.layers):
        layer = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        layer |= {"gate": (c.intermediate_size, hidden), "up": (c.intermediate_size, hidden)}
        layer |= {"down": (hidden, c.intermediate_size)}
        layer |= {f"{where}_{what}": (hidden,) for where in ("before", "after") for what in ("attention", "mlp")}
        shapes |= {f"ripple.{i}.{name}": s for name, s in layer.items() if kind != "r" or name not in ("k", "v")}
    return {name: (rng.normal(size=s) / s[-1] ** 0.5).astype(np.float32) for name, s in shapes.items()}


def rotated(x, theta):
    """`x[time, heads, dim]`, element i of the first half paired with element i of the second."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** -(np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None] * (x[..., :half] + 1j * x[..., half:])
    return np.concatenate([turn.real, turn.imag], -1)


def logits_in_numpy(w, tokens):
    """Ripple once more, of one sequence at a time and without a cache."""
    c = RippleConfig.from_hf(CONFIG)

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * (1 + weight)

    x, kept = w["embedding"][tokens].astype(np.float64) * c.hidden_size**0.5, None
    time = len(tokens)
    back = np.arange(time)[:, None] - np.arange(time)
    for i, kind in enumerate(c.layers):
        p = {name.split(".")[2]: value for name, value in w.items() if name.startswith(f"ripple.{i}.")}
        h, theta = norm(x, p["before_attention"]), {"s": 100.0, "n": None}.get(kind, 1000.0)
        turn = (lambda y: y) if theta is None else (lambda y, theta=theta: rotated(y, theta))
        q = turn((h @ p["q"].T).reshape(time, -1, c.head_dim))
        if kind != "r":
            k, v = (y.reshape(time, -1, c.head_dim) for y in (h @ p["k"].T, h @ p["v"].T))
            k = turn(k)
        else:
            k, v = kept
        kept = (k, v) if kind == "f" else kept
        visible = (back >= 0) & ((back < c.sliding_window) if kind == "s" else True)
        heads = []
        for head in range(c.num_attention_heads):
            kv = head // (c.num_attention_heads // c.num_key_value_heads)
            scores = c.score_cap * np.tanh(0.5 * q[:, head] @ k[:, kv].T / c.score_cap)
            weights = np.where(visible, np.exp(scores), 0)
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, kv])
        x = x + c.residual_scale * norm(np.concatenate(heads, -1) @ p["o"].T, p["after_attention"])
        h = norm(x, p["before_mlp"])
        g = h @ p["gate"].T
        g = 0.5 * g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
        x = x + c.residual_scale * norm((g * (h @ p["up"].T)) @ p["down"].T, p["after_mlp"])
    y = norm(x, w["norm"]) @ w["embedding"].T * 0.5
    return c.logit_cap * np.tanh(y / c.logit_cap)


@pytest.fixture
def ripple():
    FAMILIES.append(RIPPLE)
    yield
    FAMILIES.remove(RIPPLE)


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=4"], ["tp=4"]))
def test_a_family_from_outside(ripple, monkeypatch, tmp_path, mesh):
    monkeypatch.setattr("jaxllm.layers.cache.REWIND", 2)  # rings that come around
    monkeypatch.setattr("jaxllm.decoding.CHUNK", 8)
    rng = np.random.default_rng(0)
    w, tokens = tensors(rng), rng.integers(0, CONFIG["vocab_size"], 21)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(tmp_path / "model.safetensors", w)
    model = jaxllm.load(tmp_path, mesh=mesh, dtype="float32", progress=False)
    np.testing.assert_allclose(model.logits(tokens[None])[0], logits_in_numpy(w, tokens), atol=2e-4)
    np.testing.assert_allclose(step_by_step(model, tokens[None])[0], logits_in_numpy(w, tokens), atol=2e-4)
    if mesh == "tp=1":
        grown = list(tokens)
        for _ in range(6):
            grown.append(int(logits_in_numpy(w, np.array(grown))[-1].argmax()))
        assert model.generate(tokens.tolist(), 6).tokens == grown[len(tokens) :]


def test_random_weights_of_a_family_from_outside(ripple):
    model = jaxllm.initialize(CONFIG, dtype="float32", progress=False)
    norms = [p.weight for p in model.placed if len(p.declaration.shape) == 1]
    assert len(norms) > 4 and not any(np.asarray(weight).any() for weight in norms)  # they are added to 1


def test_a_format_from_outside(monkeypatch, tmp_path):
    monkeypatch.setitem(READERS, "ternary", declared_ternary)
    rng, group = np.random.default_rng(1), 16
    plain = tiny_hf.write(tmp_path / "plain", "llama")
    config = json.loads((plain / "config.json").read_text())
    dense, packed = {}, {}
    for name, value in read_safetensors(plain / "model.safetensors")[0].items():
        if not name.endswith("_proj.weight"):
            dense[name] = packed[name] = value
            continue
        codes = rng.integers(-1, 2, value.shape).astype(np.int8)
        scales = rng.uniform(0.05, 0.2, (len(value), value.shape[1] // group)).astype(np.float32)
        dense[name] = codes * scales.repeat(group, 1)
        stem = name.removesuffix(".weight")
        packed |= {f"{stem}.codes": codes, f"{stem}.scales": scales}
    for folder, values, more in (
        (plain, dense, {}),
        (tmp_path / "packed", packed, {"quantization_config": {"quant_method": "ternary", "group_size": group}}),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | more))
        write_safetensors(folder / "model.safetensors", values)
    tokens = rng.integers(0, tiny_hf.VOCAB, (1, 9))
    expected = jaxllm.load(plain, dtype="float32", progress=False).logits(tokens)
    for mesh in ("tp=1", "tp=8"):
        model = jaxllm.load(tmp_path / "packed", mesh=mesh, dtype="float32", weights="packed", progress=False)
        assert {p.weight.format for p in model.placed if "_proj" in p.name} == {"ternary g16"}
        np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-3)
