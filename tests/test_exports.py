"""What is written of a quantized matrix: the bytes of other writers, and readable by all."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from exports_cases import FORMS, MAKERS, STACKED, afq, dense, fp8, int4, integers, mxfp4, mxfp8, nvfp4
from quantized_writers import dequantize, read_safetensors, write_safetensors

from jaxllm.checkpoint.declared import declared
from jaxllm.checkpoint.exports import export, planned
from jaxllm.checkpoint.quantized import assemble
from jaxllm.checkpoint.safetensors import HFDirectory, open_directory, read_header
from jaxllm.encodings import ENCODINGS
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense

GOLDEN = Path(__file__).parent / "golden"
SHAPE, SEED = (64, 256), 15
CASES = [pytest.param(*case, id="-".join(case)) for case in FORMS]
PLAIN = ("bfloat16", "float16", "float32")
QUANTIZED = [pytest.param(*case, id="-".join(case)) for case in FORMS if case[1] not in PLAIN]


def shape_of(container, kind):
    return (2, *SHAPE) if (container, kind) == STACKED else SHAPE


def case(container, kind, module="m"):
    """A weight of this type, and its tensors."""
    made = MAKERS[container, kind](np.random.default_rng(SEED), shape_of(container, kind))
    return made, FORMS[container, kind].tensors(module, made)


def decoded(weight):
    return np.asarray(jax.tree.map(np.asarray, weight, is_leaf=lambda leaf: hasattr(leaf, "map")).dequantize())


def made(container, kind):
    return FORMS[container, kind].encoding in ENCODINGS or kind.startswith(("gptq", "awq"))


def bare(tensors):
    return {name.removeprefix("m."): array for name, array in tensors.items()}


def test_every_type_has_a_case():
    assert MAKERS.keys() == FORMS.keys()


# ---- files of other writers ----------------------------------------------------------------------------------------

# Files in tests/golden/quantized, which bitsandbytes, mlx, compressed-tensors and others packed.
FILES = {
    "gptq_2_v2": "gptq2_asym",
    "gptq_3_v2": "gptq3_asym",
    "gptq_4_v2": "gptq4_asym",
    "gptq_8_v2": "gptq8_asym",
    "gptq_3_act_order_v2": "gptq3_asym_act_order",
    "awq_32": "awq",
    "awq_64": "awq",
    "bnb_nf4": "nf4",
    "bnb_fp4": "fp4",
    "bnb_int8": "llm_int8",
    "ct_pack_4": "int4",
    "ct_int8_channel": "int8",
    "ct_fp8_channel": "fp8",
    "ct_mxfp4": "mxfp4",
    "ct_mxfp8": "mxfp8",
    "ct_nvfp4": "nvfp4",
    "fp8_block_f32": "fp8_block",
    "mxfp4_gpt_oss": "mxfp4_experts",
    **{f"mlx_{bits}": f"afq{bits}" for bits in (2, 3, 4, 5, 6, 8)},
    **{f"mlx_{n}": "afq4" for n in ("4_experts", "4_group32", "4_group64", "4_group128")},
    **{f"mlx_{mode}": mode for mode in ("mxfp4", "nvfp4", "mxfp8")},
}
NOT_WRITTEN = {"input_global_scale"}  # of activations, which our weights do not have


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_others_is_written_as_it_was(name):
    """Read and written again, every tensor has the same name, dtype, shape and bytes."""
    path = GOLDEN / "quantized" / f"{name}.safetensors"
    tensors, metadata = read_safetensors(path)
    config = {metadata["key"]: json.loads(metadata["config"])}
    arrays = {n: Dense(a) for n, a in read_header(path).items() if n.startswith("m")}
    [(module, weight)] = assemble(HFDirectory(path.parent, config, arrays)).items()
    container = "mlx" if name.startswith("mlx") else "huggingface"
    again = FORMS[container, FILES[name]].tensors(module.removesuffix(".weight"), weight)
    assert again.keys() == {n for n in arrays if n.rpartition(".")[2] not in NOT_WRITTEN}
    for key, array in again.items():
        was = tensors[key]
        assert (array.dtype, array.shape) == (was.dtype, was.shape), key
        assert array.tobytes() == was.tobytes(), key


# ---- our own ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "kind"), QUANTIZED)
def test_others_decode_the_same_matrix(container, kind):
    """By the readers of quantized_writers, which know only the tensors and the config that was written."""
    weight, tensors = case(container, kind)
    [entry, *_] = FORMS[container, kind].declaration(["lm_head"]).values()
    got, expected = dequantize(bare(tensors), entry), decoded(weight)
    if kind == "int8":  # scales of LLM.int8 are multiplied by 1 / 127
        np.testing.assert_allclose(got, expected, rtol=2**-22)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("container", "kind"), CASES)
def test_a_directory_is_read_back(container, kind, tmp_path):
    """As the config declares it, the weight has every bit that it had, and what is left out stays as it is."""
    module = "model.layers.0.mlp.experts.up_proj"
    weight, tensors = case(container, kind, module)
    head = np.ones((8, 16), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": head})
    config = {"model_type": "llama", **FORMS[container, kind].declaration(["lm_head"])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = assemble(open_directory(tmp_path))
    assert sorted(read) == ["lm_head.weight", module + ("" if (container, kind) == STACKED else ".weight")]
    got = read[max(read)]
    assert type(got) is type(weight) and got.shape == weight.shape
    np.testing.assert_array_equal(np.asarray(read["lm_head.weight"].leaf("values")), head)
    if kind == "int8":
        np.testing.assert_array_equal(np.asarray(got.leaf("values")), weight.leaf("values"))
        np.testing.assert_allclose(decoded(got), decoded(weight), rtol=2**-22)
        return
    np.testing.assert_array_equal(decoded(got), decoded(weight))
    for name in weight.axes:
        ours, theirs = np.asarray(weight.leaf(name)), np.asarray(got.leaf(name))
        if kind == "fp8" and name == "scales":
            ours = np.broadcast_to(ours, theirs.shape)
        if name == "zeros":  # GPTQ's reader has room for 2^8, which can occur in version 1
            ours = ours.astype(theirs.dtype)
        assert (theirs.dtype, theirs.tobytes()) == (ours.dtype, ours.tobytes()), name


# An encoding makes these, or calibration. MLX's NVFP4 is not what `encodings` makes, see below.
MADE = [c for c in CASES if c.values != ("mlx", "nvfp4") and made(*c.values)]


@pytest.mark.parametrize(("container", "kind"), MADE)
def test_it_is_planned_without_values(container, kind):
    tensors = case(container, kind, "a.b")[1]
    plan = planned(FORMS[container, kind], "a.b", shape_of(container, kind))
    assert {n: (p.shape, p.dtype) for n, p in plan.items()} == {n: (a.shape, a.dtype) for n, a in tensors.items()}


def test_bytes_stay_what_other_packages_have_read():
    """The outcome was written when other packages had decoded exactly these (reference/exports_check.py)."""
    outcome = json.loads((GOLDEN / "exports" / "outcome.json").read_text())
    got = {
        "-".join(key): {n: hashlib.sha256(a.tobytes()).hexdigest()[:16] for n, a in case(*key)[1].items()}
        for key in FORMS
    }
    assert got == outcome["sha256"]
    apart = {name: decoded["difference"] for name, decoded in outcome["decoded"].items()}
    assert apart.pop("huggingface-int8") < 1e-8  # scales of LLM.int8 were multiplied by 1 / 127
    assert set(apart.values()) == {0}
    logits = {name: found.get("unrounded", found["as declared"]) for name, found in outcome["logits"].items()}
    assert logits.pop("huggingface-llm_int8") < 2e-3  # bitsandbytes rounds activations
    assert max(logits.values()) < 1e-4


STACKS = {
    ("huggingface", "fp8_block"): (fp8((128, 128)), {"m", "m_scale_inv"}),
    ("huggingface", "bfloat16"): (dense(np.float32), {"m"}),
    ("mlx", "float32"): (dense(np.float32), {"m.weight"}),
    ("mlx", "afq3"): (afq(3), {"m.weight", "m.scales", "m.biases"}),
    ("mlx", "mxfp4"): (mxfp4, {"m.weight", "m.scales"}),
    ("mlx", "mxfp8"): (mxfp8, {"m.weight", "m.scales"}),
    ("mlx", "nvfp4"): (nvfp4(None), {"m.weight", "m.scales"}),
}


@pytest.mark.parametrize(("container", "kind"), STACKS)
def test_a_stack_is_its_matrices(container, kind):
    make, names = STACKS[container, kind]
    stack = make(np.random.default_rng(1), (3, *SHAPE))
    tensors = FORMS[container, kind].tensors("m", stack)
    assert tensors.keys() == names
    one = FORMS[container, kind].tensors("m", jax.tree.map(lambda leaf: leaf[1], stack))
    for whole, part in zip(tensors.values(), one.values(), strict=True):
        assert whole[1].tobytes() == part.tobytes()


def test_a_scale_of_the_matrix_is_inverted_where_it_multiplies():
    weight = nvfp4(1 / 7000)(np.random.default_rng(2), SHAPE)
    tensors = export("huggingface", "nvfp4").tensors("m", weight)
    np.testing.assert_array_equal(tensors["m.weight_global_scale"], np.float32(1) / weight.global_scale)
    config = export("huggingface", "nvfp4").declaration([])["quantization_config"]
    got = dequantize(bare(tensors), config)
    np.testing.assert_allclose(got, decoded(weight), rtol=2**-22)


def test_int4_can_be_written_as_gptq():
    """It is symmetric, so rounding to nearest needs no calibration to be a GPTQ file."""
    weight = int4(np.random.default_rng(3), SHAPE)
    form = export("huggingface", "gptq4")
    tensors = bare(form.tensors("m", weight))
    np.testing.assert_array_equal(dequantize(tensors, form.declaration([])["quantization_config"]), decoded(weight))


# ---- what config.json says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "kind"), QUANTIZED)
def test_what_is_left_out_is_declared(container, kind):
    head, gate = "lm_head", "model.layers.0.mlp.gate"
    found = declared(json.loads(json.dumps(FORMS[container, kind].declaration([head, gate]))), {})
    if (container, kind) != STACKED:  # there, whatever is packed is quantized
        assert found.excluded(gate)
        assert found.excluded(head) or kind.startswith("gptq")  # which has an entry of its own for the head
    assert found.excluded("model.layers.0.mlp.gate_proj") is None


@pytest.mark.parametrize(
    ("container", "kind", "sizes"), [("huggingface", "int4", (128, 64)), ("mlx", "afq4", (64, 32))]
)
def test_groups_of_two_sizes(container, kind, sizes, tmp_path):
    """Most modules have the first size; the others are listed."""
    groups = {"a.x": sizes[0], "a.y": sizes[1], "a.z": sizes[0]}
    form, rng = FORMS[container, kind], np.random.default_rng(4)
    make = MAKERS[container, kind]
    weights = {m: make(rng, SHAPE) if size == sizes[0] else halved(make(rng, SHAPE)) for m, size in groups.items()}
    tensors = {name: a for m, w in weights.items() for name, a in form.tensors(m, w).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **form.declaration([], groups)}))
    read = assemble(open_directory(tmp_path))
    assert {m: read[f"{m}.weight"].group for m in groups} == groups
    for module, weight in weights.items():
        np.testing.assert_array_equal(decoded(read[f"{module}.weight"]), decoded(weight))


def halved(weight: Weight) -> Weight:
    """The same codes in groups of half the size, every second one of which has twice the scale."""

    def twice(leaf):
        return None if leaf is None else np.stack([leaf, leaf * 2], -1).astype(leaf.dtype).reshape(len(leaf), -1)

    return replace(weight, scales=twice(weight.scales), biases=twice(weight.biases), group=weight.group // 2)


def test_gptq_lists_what_is_quantized_where_something_in_a_block_is_not():
    """For optimum, which compares the ends of names."""
    groups = {f"model.layers.{i}.mlp.{name}_proj": 128 for i in (0, 1) for name in ("gate", "up", "down")}
    form = export("huggingface", "gptq4")

    def listed(*left_out):
        kept = {module: size for module, size in groups.items() if module not in left_out}
        return form.declaration(left_out, kept)["quantization_config"].get("modules_in_block_to_quantize")

    assert listed("lm_head", "model.embed_tokens") is None
    assert listed("model.layers.0.mlp.gate") == [["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]]
    # What one layer has and the other has not is listed by its complete name.
    assert listed("model.layers.1.mlp.up_proj") == [["mlp.down_proj", "mlp.gate_proj", "model.layers.0.mlp.up_proj"]]


# ---- what cannot be written ----------------------------------------------------------------------------------------


def test_unknown_types_and_containers():
    with pytest.raises(InputError, match="huggingface cannot hold 'q4_k'; it can hold bfloat16, .*, awq$"):
        export("huggingface", "q4_k")
    with pytest.raises(InputError, match="container 'gguf': choose one of huggingface, mlx"):
        export("gguf", "bfloat16")


def shifted(weight):
    return replace(weight, zeros=weight.zeros + np.uint8(1))


IMPOSSIBLE = {
    "gptq4": (lambda rng: shifted(integers(4, True)(rng, SHAPE)), "'m' as gptq4: zero points other than 8"),
    "gptq3": (lambda rng: integers(3, True)(rng, (40, 256)), "40 rows: the zero points of 3 bits do not fill words"),
    "gptq8": (lambda rng: integers(8, True, True)(rng, SHAPE), "act order"),
    "gptq4_asym": (lambda rng: shifted(integers(4, False)(rng, SHAPE)), "no integers of 4 bits"),
    "awq": (lambda rng: integers(4, False, True)(rng, SHAPE), "act order"),
    "int4": (lambda rng: integers(4, False)(rng, SHAPE), "declared symmetric"),
    "int8": (lambda rng: fp8((1, None))(rng, (2, *SHAPE)), "a stack .* single matrices"),
    "mxfp4_experts": (lambda rng: mxfp4(rng, SHAPE), "stacks of experts"),
    "nf4": (lambda rng: halved_blocks(rng), "groups of 16, where bitsandbytes knows 32, 64"),
}


def halved_blocks(rng):
    weight = MAKERS["huggingface", "nf4"](rng, SHAPE)
    return replace(weight, scales=np.repeat(weight.scales, 4, axis=1), group=16)


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_a_type_cannot_hold(kind):
    make, message = IMPOSSIBLE[kind]
    with pytest.raises(InputError, match=message):
        export("huggingface", kind).tensors("m", make(np.random.default_rng(5)))


def test_mlx_has_no_scale_of_the_matrix():
    assert planned(export("mlx", "nvfp4"), "a.b", SHAPE).keys() == {"a.b.weight", "a.b.scales"}
    with pytest.raises(InputError, match="scale for the entire matrix"):
        export("mlx", "nvfp4").tensors("m", nvfp4(1 / 7000)(np.random.default_rng(5), SHAPE))


@pytest.mark.parametrize("kind", ["gptq4", "awq"])
def test_one_size_of_groups_only(kind):
    with pytest.raises(InputError, match="'b' has groups of 64, others of 128"):
        export("huggingface", kind).declaration([], {"a": 128, "b": 64, "c": 128})
