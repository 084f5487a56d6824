"""Which matrices are quantized, to what, and why."""

import re
import warnings

import numpy as np
import pytest

from jaxllm.encodings import encoding
from jaxllm.errors import InputError
from jaxllm.recipe import recipe
from jaxllm.topology import Topology
from jaxllm.tracking import Statistics

SHAPE = (64, 512)
Q = "layers.3.self_attn.q_proj.weight"

TOPOLOGY = """
0-4: {isq: Q3K}
2-6:
  isq: q8_0
5-6: {isq: hqq4}
9:
  isq: F8E4M3
11:
'/k_proj/': {isq: Q2_K}
'/layers\\.3\\..*k_proj/': {isq: 6}
"""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("layers.0.self_attn.q_proj.weight", ("0-4", "q3_k")),
        ("layers.1.mlp.up_proj.weight", ("0-4", "q3_k")),
        ("layers.2.mlp.up_proj.weight", ("2-6", "q8_0")),  # it ends later
        ("layers.3.mlp.up_proj.weight", ("2-6", "q8_0")),
        ("layers.5.mlp.up_proj.weight", ("5-6", "hqq4")),  # it ends where the other does, and comes later
        ("layers.6.mlp.up_proj.weight", None),  # ends are not included
        ("model.layers.9.mlp.up_proj.weight", ("9", "fp8")),
        ("blk.9.ffn_up.weight", ("9", "fp8")),
        ("layers.11.mlp.up_proj.weight", ("11", None)),
        ("layers.9.self_attn.k_proj.weight", ("/k_proj/", "q2_k")),  # patterns come before layers
        ("layers.3.self_attn.k_proj.weight", ("/layers\\.3\\..*k_proj/", "q6_k")),  # the last of them that fits
        ("lm_head.weight", None),
    ],
)
def test_the_entry_of_a_topology(name, found):
    entry = Topology.parse(TOPOLOGY).find([name])
    assert entry is None if found is None else (entry[0], entry[1] and entry[1].name) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected entries such as"),
        ("a: [", "not YAML"),
        ("a: {isq: q4_k}", "'a' is no layer, no range such as 0-8, and no /pattern/"),
        ("4-4: {isq: q4_k}", "the range '4-4' has no layers; its end is not included"),
        ("'/(/': {isq: q4_k}", r"'\(' is no regular expression"),
        ("4: {isq: q9}", "cannot quantize to 'q9'; known are"),
        ("4: {type: q4_k}", "entry '4' is not of the form {isq: q4_k}"),
        ("4: q4_k", "entry '4' is not of the form"),
    ],
)
def test_a_topology_that_makes_no_sense(text, message):
    with pytest.raises(InputError, match=message):
        Topology.parse(text)


def test_a_topologys_devices_are_left_out_with_a_word():
    with pytest.warns(UserWarning, match="'device' of '4' is left out: the mesh places all layers"):
        assert Topology.parse("4: {isq: q4_k, device: cpu}").find(["layers.4.x"])[1] == encoding("q4_k")


@pytest.mark.parametrize(
    ("options", "name", "shape", "type", "why"),
    [
        ({}, Q, SHAPE, "q4_k", "general type"),
        ({}, Q, (64, 96), "q5_0", r"general type; rows of 96 are not whole blocks of 256 \(q4_k\)"),
        ({}, Q, (64, 100), "f16", "rows of 100 are not whole blocks"),
        ({}, "embed_tokens.weight", SHAPE, "q6_k", "embedding or head, better than q4_k"),
        ({"type": "afq3"}, "lm_head.weight", SHAPE, "afq6", "embedding or head"),
        ({"type": "q8_0"}, "lm_head.weight", SHAPE, "q8_0", "embedding or head"),
        ({"organization": "moqe"}, Q, SHAPE, None, "not a routed expert"),
        ({"organization": "moqe"}, "layers.3.mlp.experts.up_proj", (4, 64, 512), "q4_k", "general type"),
        ({"organization": "moqe"}, "layers.3.mlp.shared_expert.up_proj.weight", SHAPE, None, "not a routed expert"),
        ({"topology": "0-8: {isq: hqq8}"}, Q, SHAPE, "hqq8", "topology 0-8"),
        ({"topology": "0-8: "}, Q, SHAPE, "q4_k", "topology 0-8"),
        ({"topology": "0-2: {isq: hqq8}", "type": None}, Q, SHAPE, None, "not in the topology"),
        ({"topology": "0-8:", "type": None}, Q, SHAPE, None, "topology 0-8"),
        ({"topology": "'/blk.3/': {isq: q8_0}"}, Q, SHAPE, "q8_0", "topology /blk.3/"),  # the file's own name
    ],
)
def test_the_type_of_a_matrix_and_why(options, name, shape, type, why):
    topology = options.get("topology")
    chosen = recipe(
        options.get("type", "q4_k"), options.get("organization"), None if topology is None else Topology.parse(topology)
    )
    found = chosen.choose(name, "blk.3.x", shape)
    assert (found.type and found.type.name) == type
    assert re.search(why, found.why)


def test_nothing_to_do():
    assert recipe(None) is None
    with pytest.raises(InputError, match="organization is for quantizing: name a type"):
        recipe(None, "moqe")
    with pytest.raises(InputError, match="organization 'all': choose one of default, moqe"):
        recipe("q4_k", "all")
    with pytest.raises(InputError, match=r"topology there\.yml: .*No such file"):
        recipe("q4_k", topology="there.yml")


def test_importance_of_another_shape():
    chosen = recipe("q4_k", importance={Q: Statistics(np.ones(256, np.float32), np.int32(1))})
    with pytest.raises(InputError, match=r"the importance of layers.3.*has shape \[256\], but its matrix \[64, 512\]"):
        chosen.importance_of(Q, SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen.importance_of("layers.4.self_attn.q_proj.weight", SHAPE) is None
