"""Rows of a batch on different devices: the logits of transformers, each device caching its own rows alone."""

from pathlib import Path

import numpy as np
import pytest
from covering import FULL, some

GOLDEN = Path(__file__).parent / "golden"


CASES = [("checkpoints/llama", "dp=8"), ("checkpoints/qwen3_moe", "dp=2,ep=2,tp=2"), ("deepseek/v3", "dp=2,tp=4")]
MORE = [("checkpoints/llama", "dp=2,tp=2"), ("gpt_oss/square", "dp=4,ep=2")]


@pytest.mark.parametrize(("name", "mesh"), some(CASES + MORE, CASES))
def test_rows_are_shared_out(load_once, name, mesh):
    model, golden = load_once(GOLDEN / name, mesh=mesh, dtype="float32"), np.load(GOLDEN / name / "golden.npz")
    rows = 8 // len(golden["tokens"])
    got = model.logits(np.concatenate([golden["tokens"]] * rows))
    np.testing.assert_allclose(got, np.concatenate([golden["logits"]] * rows), atol=1e-3)
    cache, dp = model.empty_cache(8, 16), model.mesh.shape["dp"]
    assert {shard.data.shape[0] for leaf in cache.keys for shard in leaf.addressable_shards} == {8 // dp}
    if name != "checkpoints/llama" and not FULL:
        return
    # Rows that dp does not divide are computed everywhere.
    np.testing.assert_allclose(model.logits(golden["tokens"][:1]), golden["logits"][:1], atol=1e-3)
    assert {shard.data.shape[0] for leaf in model.empty_cache(1, 16).keys for shard in leaf.addressable_shards} == {1}
