"""Gemma: what its files leave unsaid, which tensors stay as they are, and the real 270M, where that has been fetched.

Logits of tiny ones are in test_hf.py and test_gguf_architectures.py, files that we write in test_gguf_writing.py.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import some
from safetensors.numpy import load_file

import jaxllm
from jaxllm.convert import convert
from jaxllm.models.gemma.config import GemmaConfig

TESTS = Path(__file__).parent
CHECKPOINTS = TESTS / "golden" / "checkpoints"
MODEL = TESTS.parent / ".gemma" / "gemma-3-270m-q4_k_m.gguf"
SEEN = json.loads((TESTS / "golden" / "gemma_270m.json").read_text())  # what llama.cpp makes of it

# All that the config.json of Gemma 3 4B says of text.
PUBLISHED = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
PUBLISHED |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}


def test_a_config_that_says_little_means_what_transformers_takes_it_for():
    config = GemmaConfig.from_hf({"model_type": "gemma3", "text_config": PUBLISHED, "vision_config": {}})
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (262208, 8, 4)
    assert (config.head_dim, config.query_pre_attn_scalar, config.max_position_embeddings) == (256, 256, 131072)
    assert [i for i, window in enumerate(config.sliding_windows) if window is None] == [5, 11, 17, 23, 29]
    assert config.rope.inv_freq[:2] == pytest.approx((1 / 8, 1e6 ** (-1 / 128) / 8))
    assert config.local_rope.inv_freq[:2] == pytest.approx((1, 1e4 ** (-1 / 128)))
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)
    older = GemmaConfig.from_hf({"model_type": "gemma2", "num_hidden_layers": 3})
    assert (older.attn_logit_softcapping, older.final_logit_softcapping) == (50, 30)
    assert older.sliding_windows == (4096, None, 4096)
    assert older.rope == older.local_rope


@pytest.mark.parametrize(("said", "full"), [({}, [5]), ({"sliding_window_pattern": 3}, [2, 5])])
def test_every_so_many_layers_attend_to_all_positions(said, full):
    config = GemmaConfig.from_hf(PUBLISHED | {"num_hidden_layers": 7} | said)
    assert [i for i, window in enumerate(config.sliding_windows) if window is None] == full


@pytest.mark.parametrize(("name", "layers", "scale"), [("gemma2", 46, 128), ("gemma2", 42, 256), ("gemma3", 62, 128)])
def test_a_gguf_file_of_the_largest_models_scales_queries_by_the_hidden_size(name, layers, scale):
    sizes = {"block_count": layers, "embedding_length": 1024, "feed_forward_length": 8, "context_length": 8}
    sizes |= {"attention.head_count": 8, "attention.key_length": 256, "attention.layer_norm_rms_epsilon": 1e-6}
    metadata = {f"{name}.{key}": value for key, value in sizes.items()} | {f"{name}.vocab_size": 8}
    assert GemmaConfig.from_gguf(metadata | {"general.architecture": name}, {}).query_pre_attn_scalar == scale


def test_the_text_of_a_model_for_images_is_written_alone(tmp_path):
    convert(CHECKPOINTS / "gemma3", tmp_path / "a", to="int8", progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (CHECKPOINTS / "gemma3", tmp_path / "a"))
    text = {name for name in before if name.startswith("language_model.")}
    assert {name for name in after if not name.endswith("_scale")} == text
    for name in (name for name in text if name.endswith("norm.weight")):
        np.testing.assert_array_equal(after[name].view(np.uint16), before[name].view(np.uint16), err_msg=name)
    golden = np.load(CHECKPOINTS / "gemma3" / "golden.npz")
    found = jaxllm.load(tmp_path / "a", dtype="float32", progress=False).logits(golden["tokens"])
    assert np.square(found - golden["logits"]).mean() < 0.01 * np.square(golden["logits"]).mean()


@pytest.mark.optimized
@pytest.mark.skipif(not MODEL.exists(), reason="Gemma 3 270M is not here: make bench-gemma fetches it")
@pytest.mark.parametrize("mesh", some(["tp=1", "tp=2"], ["tp=1"]))
def test_gemma_3_270m_as_in_llama_cpp(mesh):
    """With the weights of the same file as float32. Llama.cpp looks GELU up in a table of float16."""
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() == SEEN["sha256"]
    model = jaxllm.load(MODEL, mesh=mesh, dtype="float32", progress=False)
    for seen in SEEN["texts"]:
        assert model.encode(seen["text"]) == seen["ids"]
        ours = np.asarray(jax.nn.log_softmax(model.logits([seen["ids"]], last_only=True)[0]))
        np.testing.assert_allclose(ours[list(map(int, seen["top"]))], list(seen["top"].values()), atol=0.02)
        assert model.generate(seen["ids"], len(seen["greedy"])).tokens == seen["greedy"]
