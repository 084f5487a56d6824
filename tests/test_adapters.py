"""Models with adapters against the logits of peft, llama.cpp and mlx-lm; over quantized bases; and taken off again."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_hf
from covering import in_turn, some
from hf_to_gguf import convert
from quantized_writers import FORMATS, quantized_checkpoint, read_safetensors, write_safetensors
from test_adapter_files import write_peft

import jaxllm
from jaxllm.cli import main
from jaxllm.convert import convert as convert_checkpoint
from jaxllm.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = GOLDEN / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir() if (path / "adapter_model.safetensors").is_file())
LLAMA = GOLDEN / "checkpoints" / "llama"


def base_of(name):
    return GOLDEN / json.loads((ADAPTERS / name / "adapter_config.json").read_text())["base_model_name_or_path"]


def peft(name, key="logits"):
    return np.load(ADAPTERS / name / "golden.npz")[key]


def check(model, base, expected):
    got = model.logits(np.load(base / "golden.npz")["tokens"])
    np.testing.assert_allclose(got, expected, atol=1e-4)


EXPERTS = ["each_expert", "experts", "latents", "transposed"]
ATTACHED = ["patterns", "second"]  # and taken off again, in a test of its own
MESHED = in_turn(some(NAMES, [name for name in NAMES if name not in (*EXPERTS, *ATTACHED)]), "tp=1", "tp=2", "tp=8")
MESHED += in_turn(EXPERTS, "ep=4", "tp=2,ep=2")


@pytest.mark.parametrize(("name", "mesh"), MESHED)
def test_logits_are_those_of_peft(load_once, name, mesh):
    base = base_of(name)
    model = load_once(base, mesh=mesh, dtype="float32", adapters=(ADAPTERS / name,))
    check(model, base, peft(name))


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_summed(load_once, merge):
    both = ((ADAPTERS / "second", -0.5), ADAPTERS / "patterns")
    model = load_once(LLAMA, mesh="tp=2", dtype="float32", adapters=both, merge_adapters=merge)
    check(model, LLAMA, peft("second", "logits_sum"))
    assert dict(model.adapters) == ({} if merge else {"second": -0.5, "patterns": 1.0})


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory):
    """Its rows of q and k are in another order than the Hugging Face directory's."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    convert(LLAMA, path)
    return path


BASES = [("second", "gguf", "tp=8"), ("ends", "directory", "tp=2")]


@pytest.mark.parametrize(
    ("name", "base", "mesh"), some([*BASES, ("second", "directory", "tp=2"), ("ends", "gguf", "tp=8")], BASES)
)
def test_a_gguf_adapter_adds_what_it_adds_in_llama_cpp(load_once, llama_gguf, name, base, mesh):
    path = llama_gguf if base == "gguf" else LLAMA
    model = load_once(path, mesh=mesh, dtype="float32", adapters=(ADAPTERS / "gguf" / f"{name}.gguf",))
    check(model, LLAMA, np.load(ADAPTERS / "gguf" / f"{name}.npy"))


def test_stacks_of_experts_add_what_they_add_in_llama_cpp(load_once, tmp_path):
    convert(base := GOLDEN / "checkpoints" / "qwen2_moe", tmp_path / "base.gguf")
    adapter = ADAPTERS / "gguf" / "experts.gguf"
    for path in some((base, tmp_path / "base.gguf"), [tmp_path / "base.gguf"]):
        model = load_once(path, mesh="ep=2", dtype="float32", adapters=(adapter,))
        check(model, base, np.load(adapter.with_suffix(".npy")))


@pytest.mark.parametrize("name", some(["patterns", "ends"], ["patterns"]))
def test_an_adapter_of_peft_on_a_gguf_file(load_once, llama_gguf, name):
    model = load_once(llama_gguf, mesh="tp=2", dtype="float32", adapters=(ADAPTERS / name,))
    check(model, LLAMA, peft(name))


@pytest.mark.parametrize("mesh", some(["tp=2", "tp=8"], ["tp=8"]))
def test_a_matrix_that_a_gguf_file_has_in_two_parts(load_once, tmp_path_factory, mesh):
    """kv_b: each head's keys, transposed, and its values."""
    path = tmp_path_factory.getbasetemp() / "latents.gguf"
    if not path.exists():
        convert(base_of("latents"), path)
    model = load_once(path, mesh=mesh, dtype="float32", adapters=(ADAPTERS / "latents",))
    assert {p.name: p.weight.format for p in model.placed}["layers.0.self_attn.k_b_proj"] == "float32 + rank 8"
    check(model, base_of("latents"), peft("latents"))


def test_a_norm_that_files_store_in_two_ways(load_once, tmp_path):
    """Gemma's, trained as a whole: a directory stores it as less by 1 than a GGUF file does."""
    base, name = GOLDEN / "checkpoints" / "gemma2", "model.layers.0.input_layernorm.weight"
    tensors, _ = read_safetensors(base / "model.safetensors")
    trained = np.random.default_rng(0).normal(size=tensors[name].shape).astype(np.float32)
    adapter = write_peft(tmp_path / "adapter", {f"base_model.model.{name}": trained})
    shutil.copytree(base, tmp_path / "changed")
    write_safetensors(tmp_path / "changed" / "model.safetensors", tensors | {name: trained})
    expected = load_once(tmp_path / "changed", dtype="float32").logits(np.load(base / "golden.npz")["tokens"])
    convert(base, tmp_path / "base.gguf")
    for path in (base, tmp_path / "base.gguf"):
        check(load_once(path, dtype="float32", adapters=(adapter,)), base, expected)


def test_a_matrix_in_two_parts_that_does_not_fit(tmp_path):
    convert(base_of("latents"), tmp_path / "base.gguf")
    name = "base_model.model.model.layers.0.self_attn.kv_b_proj"
    for sizes, message in (
        ((64, 15), "'model.layers.0.self_attn.kv_b_proj.weight' is for a matrix of shape [4, 15, 8], but"),
        ((60, 16), "the model has no place for 'model.layers.0.self_attn.kv_b_proj.weight'"),
    ):
        pair = {f"{name}.lora_A.weight": np.ones((2, sizes[1])), f"{name}.lora_B.weight": np.ones((sizes[0], 2))}
        adapter = write_peft(tmp_path / str(sizes[0]), {key: x.astype(np.float32) for key, x in pair.items()})
        text = refusal(lambda a=adapter: jaxllm.load(tmp_path / "base.gguf", adapters=[a], progress=False))
        assert message in text


@pytest.mark.parametrize(("name", "base", "mesh"), [("ends", "llama", "tp=8"), ("experts", "qwen2_moe", "tp=1")])
def test_an_mlx_adapter_adds_what_it_adds_in_mlx_lm(load_once, name, base, mesh):
    base = GOLDEN / "checkpoints" / base
    model = load_once(base, mesh=mesh, dtype="float32", adapters=(ADAPTERS / "mlx" / name,))
    check(model, base, np.load(ADAPTERS / "mlx" / name / "logits.npy"))


def test_attached_scaled_and_taken_off_without_compiling_anew(load_once):
    model = load_once(LLAMA, mesh="tp=2", dtype="float32")
    before = np.load(LLAMA / "golden.npz")["logits"]
    check(model, LLAMA, before)
    assert model.adapters.add(ADAPTERS / "patterns") == "patterns"
    check(model, LLAMA, peft("patterns"))
    compiled = dict(model.programs.compiled)
    assert model.adapters.add(ADAPTERS / "second", scale=3.0) == "second"  # ranks of 4 + 4 fit into the room of 8
    model.adapters["second"] = -0.5
    check(model, LLAMA, peft("second", "logits_sum"))
    del model.adapters["patterns"]
    model.adapters["second"] = 1.0
    check(model, LLAMA, peft("second"))
    del model.adapters["second"]
    check(model, LLAMA, before)
    assert model.adapters.add(ADAPTERS / "gguf" / "second.gguf") == "second"  # the same changes by other names
    check(model, LLAMA, peft("second"))
    del model.adapters["second"]
    assert model.programs.compiled == compiled


def said(model, memory, prompt):
    completion = jaxllm.Completion(prompt)
    list(model.stream(prompt, 6, eos_ids=(), memory=memory, completion=completion))
    return completion.tokens


def test_answers_are_of_the_adapters_that_are_attached(load_once):
    """Also in a conversation: what it has cached of another model does not count."""
    model, memory = load_once(LLAMA, mesh="tp=2", dtype="float32"), jaxllm.Memory()
    tokens = np.load(LLAMA / "golden.npz")["tokens"][0].tolist()
    steps = [(None, np.load(LLAMA / "golden.npz")["greedy"][0])]
    steps += [(name, np.argmax(peft(name)[0, -1])) for name in ("patterns", "second")]
    for name, first in steps:
        if name:
            model.adapters.add(ADAPTERS / name)
        answer = said(model, memory, tokens)
        assert (answer[0], memory.reused) == (first, 0)
        whole = np.asarray(model.logits([[*tokens, *answer[:-1]]]))[0, len(tokens) - 1 :]
        assert answer == np.argmax(whole, -1).tolist()
        assert said(model, memory, tokens) == answer
        assert memory.reused > 0
        if name:
            del model.adapters[name]


MERGED = [("biases", "huggingface"), ("latents", "huggingface"), ("transposed", "gguf")]


@pytest.mark.parametrize(("name", "container"), some([*MERGED, ("experts", "gguf")], MERGED))
def test_a_checkpoint_that_was_merged_with_an_adapter(load_once, tmp_path, name, container):
    merged = tmp_path / ("out.gguf" if container == "gguf" else "out")
    options = {"to": "float32", "container": container, "progress": False}
    convert_checkpoint(base_of(name), merged, adapters=[ADAPTERS / name], **options)
    check(load_once(merged, dtype="float32"), base_of(name), peft(name))


def test_the_command_line_takes_adapters(load_once, tmp_path, capsys):
    command = ["convert", str(LLAMA), str(tmp_path / "sum"), "--to", "float32"]
    assert main([*command, "--adapter", f"{ADAPTERS / 'second'}=-0.5", "--adapter", str(ADAPTERS / "patterns")]) == 0
    check(load_once(tmp_path / "sum", dtype="float32"), LLAMA, peft("second", "logits_sum"))
    assert main(["generate", "--model", str(LLAMA), "--prompt", "x", "--adapter", "tuned=much"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: --adapter tuned=much: 'much' is not a number; write PATH=SCALE, such as tuned=0.5"


TOKENS = np.random.default_rng(0).integers(0, tiny_hf.VOCAB, (1, 12)).astype(np.int32)
FEW = ("gptq-act-order", "fp8-block", "bnb-nf4-nested")  # a permutation, scales of squares, none of rows
MESHES = {"llama": "tp=8", "qwen3_moe": "tp=2,ep=4", "deepseek": "tp=2"}
# Words of three-bit codes do not fit 80 rows, which DeepSeek's latents with their rotary keys have.
UNFIT = ("gptq-3", "deepseek")
CASES = [case for case in in_turn(some([*FORMATS], FEW), *MESHES) if case != UNFIT]
PROJECTION = re.compile(r"model\.layers\..*_proj(_with_mqa)?|lm_head")


def adapted(plain, folder):
    """An adapter of every projection and the head of a directory, and the directory with it added, in numpy."""
    rng, tensors, pairs = np.random.default_rng(3), read_safetensors(plain / "model.safetensors")[0], {}
    for key, matrix in tensors.items():
        module = key.removesuffix(".weight")
        if PROJECTION.fullmatch(module):
            rank = 4 if module.endswith("down_proj") else 2
            a = (rng.normal(size=(rank, matrix.shape[1])) / matrix.shape[1] ** 0.5).astype(np.float32)
            b = (rng.normal(size=(matrix.shape[0], rank)) / 4).astype(np.float32)
            pairs |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            tensors[key] = (matrix + 6 / rank * (b @ a)).astype(np.float32)
    write_safetensors(plain / "model.safetensors", tensors)
    return write_peft(folder / "adapter", pairs, lora_alpha=6, rank_pattern={"down_proj": 4}), plain


@pytest.fixture(scope="module")
def logits_of():
    """Logits of dense checkpoints. Those of a model differ in nothing but numbers: its programs do for all."""
    models = {}

    def logits(model, path):
        loaded = jaxllm.load(path, dtype="float32", progress=False)
        compiled = models.setdefault(model, loaded)
        compiled.programs.leaves = loaded.programs.leaves
        return np.asarray(compiled.logits(TOKENS))

    return logits


@pytest.mark.parametrize(("name", "model"), CASES)
def test_logits_over_a_quantized_base_are_those_of_the_sum(logits_of, tmp_path, name, model):
    source = tiny_hf.write(tmp_path / "source", model)
    packed, plain = quantized_checkpoint(source, tmp_path, name, np.random.default_rng(1))
    adapter, merged = adapted(plain, tmp_path)
    options = {"mesh": MESHES[model], "dtype": "float32", "weights": "packed", "progress": False}
    loaded = jaxllm.load(packed, adapters=[adapter], **options)
    held = {p.name: p.weight.format for p in loaded.placed}
    assert re.fullmatch(r"(?!float).* \+ rank 8", held["layers.0.self_attn.o_proj.weight"])
    np.testing.assert_allclose(loaded.logits(TOKENS), logits_of(model, merged), atol=1e-3)


@pytest.mark.parametrize("quantize", some(["q8_0", "q4_k"], ["q4_k"]))
def test_merged_before_it_is_encoded(tmp_path, quantize):
    """As if the sum had been the checkpoint; beside the base, only the base is encoded."""
    source = tiny_hf.write(tmp_path / "source", "llama")
    original = read_safetensors(source / "model.safetensors")[0]
    adapter, merged = adapted(source, tmp_path)
    options = {"mesh": "tp=2", "dtype": "float32", "quantize": quantize, "weights": "packed", "progress": False}
    model = jaxllm.load(merged, **options)
    expected = model.logits(TOKENS)
    write_safetensors(source / "model.safetensors", original)
    got = jaxllm.load(source, adapters=[adapter], merge_adapters=True, **options)
    assert dict(got.adapters) == {}
    model.programs.leaves = got.programs.leaves  # the same programs, other numbers
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-3)


def test_merged_with_a_base_that_stays_quantized_is_refused(tmp_path):
    source = tiny_hf.write(tmp_path / "source", "llama")
    packed, plain = quantized_checkpoint(source, tmp_path, "fp8-block", np.random.default_rng(1))
    adapter, _ = adapted(plain, tmp_path)
    with pytest.raises(InputError, match="to merge with it, name a type that it is encoded in afterwards"):
        jaxllm.load(packed, dtype="float32", weights="packed", adapters=[adapter], merge_adapters=True, progress=False)


def refusal(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def load_adapted(name, *adapters):
    return lambda: jaxllm.load(GOLDEN / "checkpoints" / name, adapters=adapters, progress=False)


def test_an_adapter_for_another_model_is_refused_with_all_that_does_not_fit():
    text = refusal(load_adapted("qwen2", ADAPTERS / "second"))
    for layer in range(2):
        assert f"'model.layers.{layer}.self_attn.q_proj.weight' is for a matrix of shape [64, 32]" in text
    assert str(ADAPTERS / "second") in text
    text = refusal(load_adapted("llama", ADAPTERS / "latents"))
    assert "'model.layers.0.self_attn.q_a_proj.weight'" in text and "more" in text
    # The same names and shapes, but another order of rows.
    text = refusal(load_adapted("qwen3", ADAPTERS / "gguf" / "second.gguf"))
    assert "second.gguf: is for models of type 'llama', and this is qwen3" in text


def test_what_cannot_be_attached_later_says_so(load_once):
    qwen2 = load_once(base_of("tied"), mesh="tp=1", dtype="float32")
    assert "give it to load(adapters=...)" in refusal(lambda: qwen2.adapters.add(ADAPTERS / "tied"))
    assert "trained" in refusal(lambda: qwen2.adapters.add(ADAPTERS / "biases"))
    assert "no adapter 'x'; attached: none" in refusal(lambda: qwen2.adapters.__getitem__("x"))
    assert dict(qwen2.adapters) == {}
