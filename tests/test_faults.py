"""Disks that damage, cut or fill up, processes that are ended, devices that are too small: one line each, no loss."""

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
import tiny_gguf
from compiled import dequantized
from covering import FULL, some
from forked import Forked
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader
from jax.sharding import PartitionSpec
from live_server import EOS
from tiny_chat import write_chat
from tiny_gguf import Tiny

import jaxllm
from jaxllm import device_memory, files
from jaxllm.checkpoint import filling
from jaxllm.cli import main
from jaxllm.convert import convert
from jaxllm.declaration import Declaration
from jaxllm.errors import InputError
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.parallel import make_mesh
from jaxllm.placing import FileArray, Source, place

LLAMA = Path(__file__).parent / "golden" / "checkpoints" / "llama"
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path, Tiny(layers=1))
    return path


def copied(path, folder):
    return Path(shutil.copytree(path, folder / "copy") if path.is_dir() else shutil.copy(path, folder / path.name))


def flipped(path, offset):
    """One bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


# ---- checksums ------------------------------------------------------------------------------------------------------

WRITTEN = {
    "directory": ({"to": "bfloat16"}, "SHA256SUMS", "model.safetensors"),
    "gguf": ({"to": "q8_0", "container": "gguf"}, "out.sha256", "out"),
    "uqff": ({"to": "q8_0", "container": "uqff"}, "SHA256SUMS", "q8_0-0.uqff"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_damage_is_found_by_checksums(tmp_path, kind):
    options, sums, file = WRITTEN[kind]
    out = tmp_path / "out"
    convert(LLAMA, out, **options, checksums=True, **QUIET)
    folder = out if out.is_dir() else tmp_path
    lines = [line.split("  ") for line in (folder / sums).read_text().splitlines()]
    expected = {path.name for path in folder.iterdir()} - {sums}
    assert {name for _, name in lines} == expected
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for digest, name in lines)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "--strict", sums], cwd=folder, check=True)
    jaxllm.load(out, verify=True, dtype="float32", **QUIET)
    flipped(folder / file, (folder / file).stat().st_size - 5)
    with pytest.raises(InputError, match=rf"{re.escape(str(folder / file))}: damaged: "):
        jaxllm.load(out, verify=True, **QUIET)


def test_checksums_are_of_what_is_there_now(tmp_path):
    """Those of a source are not copied; a conversion that goes on writes them as well."""
    convert(LLAMA, tmp_path / "a", to="bfloat16", checksums=True, **QUIET)
    convert(tmp_path / "a", tmp_path / "b", to="float32", verify=True, **QUIET)
    assert not (tmp_path / "b" / "SHA256SUMS").exists()
    with pytest.raises(InputError, match="b: no SHA256SUMS in it, so there is nothing to verify it with"):
        convert(tmp_path / "b", tmp_path / "c", to="bfloat16", verify=True, **QUIET)


def test_lists_of_the_hub_are_understood(tmp_path):
    """Marked as binary, in capitals, with files that were not fetched; but weights have to be listed and there."""
    folder = copied(LLAMA, tmp_path)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    listed = [f"{digest.upper()} *./{name}\n" for name, digest in sums.items()]
    others = [f"{'0' * 64}  README.md\n", f"{'0' * 64}  onnx/model.onnx\n", "# made by hand\n"]
    (folder / "SHA256SUMS").write_text("".join([*listed, *others]))
    jaxllm.load(folder, verify=True, **QUIET)
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"more\.safetensors: not in SHA256SUMS"):
        jaxllm.load(folder, verify=True, **QUIET)
    (folder / "more.safetensors").unlink()
    (folder / "model.safetensors").rename(folder / "renamed")
    with pytest.raises(InputError, match=r"model\.safetensors: missing, but in SHA256SUMS"):
        jaxllm.load(folder, verify=True, **QUIET)
    (folder / "SHA256SUMS").write_text("nothing\n")
    with pytest.raises(InputError, match="SHA256SUMS: no line is a SHA-256 and the name of a file"):
        jaxllm.load(folder, verify=True, **QUIET)


def test_the_parts_of_a_split_file_are_verified_together(tmp_path):
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for path in parts:
        path.write_bytes(path.name.encode())
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
    (tmp_path / "SHA256SUMS").write_text(f"{digests[0]}  {parts[0].name}\n")
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf: in no m-00002-of-00002\.gguf\.sha256 or SHA256SUMS"):
        jaxllm.load(parts[0], verify=True, **QUIET)
    parts[1].with_name(f"{parts[1].name}.sha256").write_text(f"{'1' * 64}  {parts[1].name}\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(parts[1]))}: damaged"):
        jaxllm.load(parts[0], verify=True, **QUIET)


def test_the_command_line_verifies(gguf, tmp_path, capsys):
    path = copied(gguf, tmp_path)
    path.with_name("tiny.gguf.sha256").write_text(f"{'0' * 64}  tiny.gguf\n")
    assert main(["generate", "--model", str(path), "--prompt-ids", "1", "--verify"]) == 2
    assert main(["convert", str(path), str(tmp_path / "b.gguf"), "--to", "q8_0", "--verify"]) == 2
    line = f"error: {path}: damaged: not what the checksums were made of; get it anew\n"
    assert capsys.readouterr() == ("", line * 2)


# ---- numbers that are not finite ------------------------------------------------------------------------------------


SOME_TYPES = ["Q4_1", "Q2_K", "Q3_K", "Q6_K", "Q8_K", "TQ1_0", "IQ1_M", "IQ4_NL", "MXFP4"]


@pytest.mark.parametrize("type", some(list(BLOCK_TYPES), SOME_TYPES))
def test_what_is_counted_decodes_to_no_number(type):
    """The decoders, which are tested against gguf-py, say which blocks are to be counted: every value of every byte."""
    size = BLOCK_TYPES[type].nbytes
    blocks = np.zeros((size, 256, size), np.uint8)
    if type == "IQ1_M":  # its scale is spread over the high nibbles of two words
        blocks[..., 55] = 0x70
    blocks[np.arange(size), :, np.arange(size)] |= np.arange(256, dtype=np.uint8)
    blocks = blocks.reshape(-1, size)
    if type == "Q8_K":
        blocks[:, 2] |= 0x80
    values = dequantized(GGML(blocks[:, None], type))
    bad = ~np.isfinite(values).all(-1)
    for some_blocks, count in ((blocks[bad], bad.sum()), (blocks[~bad], 0)):
        assert GGML(some_blocks, type).not_finite("blocks", some_blocks) == count
    assert bad.any() == (type not in ("MXFP4", "NVFP4"))


def spoiled(gguf, folder, name, numbers):
    """A copy of a GGUF file, some of whose float16 or float32 numbers (at these bytes of a tensor) are infinite."""
    path = copied(gguf, folder)
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    infinite = np.array(np.inf, np.float32 if tensor.tensor_type == T.F32 else np.float16).tobytes()
    with path.open("r+b") as file:
        for offset in numbers:
            file.seek(tensor.data_offset + offset)
            file.write(infinite)
    return path


@pytest.mark.parametrize(
    ("name", "numbers", "what"),
    [("blk.0.attn_q.weight", (0, 34), "2 of the numbers in its blocks"), ("output_norm.weight", (8,), "1 .* values")],
)
@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
def test_scales_and_norms_of_gguf_files_are_named(gguf, tmp_path, name, numbers, what, mesh):
    """Of Q8_0, whose blocks have 34 bytes; what several devices hold is counted once."""
    path = spoiled(gguf, tmp_path, name, numbers)
    with pytest.raises(InputError, match=f"tensor '{name}': {what} are infinite or no numbers, so every answer"):
        jaxllm.load(path, mesh=mesh, **QUIET)


def test_of_experts_it_is_a_warning():
    """Of two, on a device each, one has an infinite scale in one of its blocks."""
    blocks = np.zeros((2, 4, 1, 34), np.uint8)
    blocks[1, 2, 0, 1] = 0x7C
    declared = Declaration((2, 4, 32), PartitionSpec("ep", None, None))
    said = "tensor 'x': 1 of the numbers in its blocks are infinite or no numbers, so answers may be nonsense"
    with pytest.warns(UserWarning, match=said):
        placed = place(Source("x", (GGML(blocks, "Q8_0"),)), declared, make_mesh("ep=2"))
    np.testing.assert_array_equal(placed.blocks, blocks)


# ---- files that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_arrays_in_files_are_numpys(tmp_path, shape, transposed):
    if transposed and len(shape) < 2:
        return
    rng, values = np.random.default_rng(0), np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    (tmp_path / "x").write_bytes(bytes(3) + values.tobytes())
    array = FileArray(tmp_path / "x", 3, shape, values.dtype)
    if transposed:
        array, values = array.swapaxes(-1, -2), values.swapaxes(-1, -2)
    for _ in range(50):
        ends = [sorted(rng.integers(0, n + 1, 2)) for n in array.shape[: rng.integers(0, len(shape) + 1)]]
        part = tuple(slice(int(a), int(b)) for a, b in ends)
        np.testing.assert_array_equal(array.read(part), values[part])
        out = np.zeros(values[part].T.shape, values.dtype).T
        array.read_into(out, part)
        np.testing.assert_array_equal(out, values[part])


CUT = """
import os, sys
from jaxllm.checkpoint import filling
from jaxllm.cli import main
really = filling.fill
def fill(*args):
    os.truncate(sys.argv[1], 0)
    return really(*args)
filling.fill = fill
sys.exit(main(["generate", "--model", sys.argv[1], "--prompt-ids", "1", "--max-new-tokens", "2"]))
"""


def test_a_file_that_is_cut_after_it_was_opened_is_an_error(gguf, tmp_path):
    """Of a mapped file, the process would die of SIGBUS."""
    path = copied(gguf, tmp_path)
    done = Forked(CUT, path).finished()
    said = f"error: {path}: was changed or cut short while it was read\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_a_file_that_is_written_after_it_was_opened_is_an_error(tmp_path, monkeypatch):
    """Else half of the weights could be of another model."""
    path, really = copied(LLAMA, tmp_path), filling.fill

    def fill(*args):
        flipped(path / "model.safetensors", 5000)
        return really(*args)

    monkeypatch.setattr(filling, "fill", fill)
    with pytest.raises(InputError, match=r"model\.safetensors: was changed or cut short while it was read"):
        jaxllm.load(path, **QUIET)


def test_a_loaded_model_does_not_need_its_file(gguf, tmp_path):
    path = copied(gguf, tmp_path)
    model = jaxllm.load(path, weights="packed", **QUIET)
    before = np.asarray(model.logits([[1, 2, 3]]))
    os.truncate(path, 0)
    np.testing.assert_array_equal(model.logits([[1, 2, 3]]), before)


def test_reading_can_be_given_up(tmp_path, monkeypatch):
    """Also in the middle of a large array."""
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(files, "PIECE", 1 << 10)
    given_up, seen = threading.Event(), []

    def read():
        files.give_up_reading(given_up)
        runs = ((0, memoryview(bytearray(1 << 20))) for _ in range(10))
        try:
            files.read_runs(tmp_path / "x", runs)
        except InputError as error:
            seen.append(str(error))

    given_up.set()
    thread = threading.Thread(target=read)
    thread.start()
    thread.join(60)
    assert seen == [f"{tmp_path / 'x'}: reading was given up"]


# ---- devices that are too small -------------------------------------------------------------------------------------


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")


def test_weights_that_do_not_fit_say_what_would(gguf, monkeypatch):
    """The matrices of the tiny model have 37,120 weights, of 8.5 bits in Q8_0; its norms have 3 x 64 of 32."""
    monkeypatch.setattr(filling, "place", exhausted)
    monkeypatch.setattr(device_memory, "_memory", lambda mesh: (20_000, 11_000))
    monkeypatch.setattr(device_memory, "_shown", str)
    for mesh, takes in (("tp=1", 37120 * 8.5 / 8 + 192 * 4), ("tp=2", 37120 * 8.5 / 16 + 192 * 4)):
        with pytest.raises(InputError) as caught:
            jaxllm.load(gguf, weights="packed", mesh=mesh, **QUIET)
        assert str(caught.value) == (
            f"{gguf}: no room for the weights of {takes} a device, where 11000 of 20000 are free: use more devices, "
            "such as tp=4, or quantize them (quantize='q4_k')"
        )


def test_a_cache_that_does_not_fit_says_what_would(tmp_path):
    """Not emulated: no machine has 2 x 4 (bytes) x 2 (heads) x 16 (values) x 4096 x 2**30 bytes."""
    tiny_gguf.write(tmp_path / "long.gguf", Tiny(layers=1, context=2**30))
    model = jaxllm.load(tmp_path / "long.gguf", dtype="float32", **QUIET)
    with pytest.raises(InputError) as caught:
        model.empty_cache(4096)
    found = re.fullmatch(
        r"no room for a cache of 4096 x 1,073,741,824 positions of 1,048,576.00 GiB a device, where ([\d,.]+) GiB of "
        r".* GiB are free: use fewer sequences or positions \(([\d,]+) of these would fit\), more devices \(tp\), or "
        r"cache keys and values in 8 bits \(cache_dtype\)",
        str(caught.value),
    )
    free, fits = (float(number.replace(",", "")) for number in found.groups())
    assert fits == pytest.approx(free * 1024, rel=0.01)  # of all these sequences, a position takes 1 MiB


def test_a_step_that_does_not_fit_says_what_would(gguf, monkeypatch):
    model = jaxllm.load(gguf, **QUIET)
    model.logits([[1, 2]])
    key = next(key for key in model.programs.compiled if key[0] == "extend")
    model.programs.compiled[key] = exhausted
    with pytest.raises(InputError, match=r"no room for a step of the model, .*: use more devices \(tp\), fewer"):
        model.logits([[1, 2]])


# ---- signals, and slow disks ----------------------------------------------------------------------------------------

# What a job in the background starts ignores Ctrl-C.
HEEDED = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
COMMAND = HEEDED + "from jaxllm.cli import main\nsys.exit(main(sys.argv[1:]))"
SLOW = """
import threading, time
from jaxllm import placing
really, pace = placing.read_runs, float(sys.argv.pop(1))
def slow(file, runs, stamp):
    def pieces():
        for offset, buffer in runs:
            for i in range(0, len(buffer), 1024):
                time.sleep(pace)
                yield offset + i, buffer[i : i + 1024]
    really(file, pieces(), stamp)
placing.read_runs = slow
"""


def await_(condition):
    """Its value, as soon as it is true."""
    for _ in range(6000):
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("it does not come true")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("chat") / "chat.gguf", context=1 << 16)


def test_an_answer_is_interrupted_with_a_line_break(chat):
    args = ("generate", "--model", chat, "--raw", "--prompt", "th", "--max-new-tokens", 60_000)
    process = Forked(COMMAND, *args)
    await_(lambda: len(process.stdout.read_text()) >= 8)
    process.send_signal(signal.SIGINT)
    done = process.finished(timeout=60)
    assert (done.returncode, done.stderr, done.stdout[-1:]) == (130, "", "\n")


@pytest.mark.parametrize(("grace", "signals"), [(1, 1), (100, 2)], ids=["once", "twice"])
def test_a_server_is_interrupted_while_it_answers(chat, grace, signals):
    """It waits for as long as it was told; who presses Ctrl-C twice does not want to wait."""
    args = ("serve", "--model", chat, "--port", 0, "--slots", 1, "--capacity", 1 << 16, "--grace", grace)
    process = Forked(COMMAND, *args)
    url = await_(lambda: re.fullmatch(r"serving .* at (.*)\n", process.stderr.read_text()))[1]
    fields = {"model": "chat.gguf", "prompt": "th", "max_tokens": 60_000, "logit_bias": {EOS: -100}}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(**fields, stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        next(stream)
        if signals == 2:
            process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    done = process.finished(timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_training_that_is_asked_to_end_keeps_its_checkpoint(chat, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "the thing"}\n' * 4)
    out = tmp_path / "out"
    args = ("--data", tmp_path / "data.jsonl", "--out", out, "--steps", 10_000, "--save-every", 1, "--rank", 1)
    process, content = Forked(COMMAND, "finetune", "--model", chat, *args), tmp_path / ".out.partial" / "content"
    await_(lambda: any(content.glob("checkpoint-*")))
    process.send_signal(signal.SIGTERM)
    done = process.finished(timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert not out.exists()
    kept = max(content.glob("checkpoint-*"))  # the one before it may be about to be removed
    assert {"adapter_model.safetensors", "state.safetensors", "training.json"} < {path.name for path in kept.iterdir()}


@pytest.mark.parametrize("pace", [0.002, 2.0], ids=["waited for", "interrupted"])
def test_a_slow_disk(gguf, pace):
    """Progress is shown on a terminal. Of a large matrix, with 7 pieces of 1 KB, the rest is not waited for."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    args = (pace, "generate", "--model", gguf, "--prompt-ids", "1,2,3", "--max-new-tokens", 2)
    process, shown = Forked(HEEDED + SLOW + COMMAND, *args, terminal=os.ttyname(theirs)), b""
    while b"loading:" not in shown:
        shown += os.read(ours, 1000)
    if pace > 0.1:
        time.sleep(0.5)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
    done = process.finished(timeout=60)
    assert (done.returncode, done.stdout.count(",")) == ((130, 0) if pace > 0.1 else (0, 1))
    if pace > 0.1:
        assert time.monotonic() - sent < 10
    os.close(theirs)
    with suppress(OSError):
        while more := os.read(ours, 10_000):
            shown += more
    os.close(ours)
    assert b"Traceback" not in shown and b"rror" not in shown


def test_what_is_killed_goes_on_to_the_same_bytes():
    """A conversion, a quantization and a training, at a new moment each; the output says the seed. Without --full, no
    quantization, which goes on as conversions do."""
    commands = some(["convert", "quantize", "finetune"], ["convert", "finetune"])
    args = ("--moments", 50 if FULL else 1, "--only", *commands)
    done = Forked("from fuzz.kills import main\nmain()", *args).finished(timeout=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\| (\w+) \| \d+ ", done.stdout, re.MULTILINE) == commands


# ---- many conversations ---------------------------------------------------------------------------------------------


def test_many_conversations_take_no_more_than_few():
    """Memory, mappings and files stay as they are, else the exit code is 1."""
    code = "import runpy, sys\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script = Path(__file__).parent / "reference" / "soak.py"
    done = Forked(code, script, "--conversations", 2000 if FULL else 40).finished(timeout=None)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- full disks -----------------------------------------------------------------------------------------------------

# A file that grows beyond a limit is refused as on a full disk, but with another number.
FULL_DISK = """
import contextlib, io, json, resource, signal, sys
import jax
from jaxllm.cli import main
jax.config.update("jax_enable_compilation_cache", False)  # compiled programs would be too large as well
jax.config.update("jax_compilation_cache_dir", "unused")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
done = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        code = main(command)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    done.append([code, said.getvalue()])
print(json.dumps(done))
"""
LEARN = ("--rank", "1", "--steps", "2", "--save-every", "1")


def test_a_full_disk_is_one_line_and_leaves_nothing_under_the_name(chat, tmp_path):
    """Whatever writes: what is complete stays in a hidden folder, where a second run finds it, or nothing does."""
    (tmp_path / "text").write_text("the thing " * 80)
    (tmp_path / "data").write_text('{"text": "the thing"}\n' * 4)
    commands = {
        "directory": ("convert", LLAMA, tmp_path / "directory", "--to", "float32", "--checksums"),
        "file.gguf": ("convert", LLAMA, tmp_path / "file.gguf", "--to", "q8_0", "--container", "gguf", "--checksums"),
        "uqff": ("convert", LLAMA, tmp_path / "uqff", "--to", "q8_0", "--container", "uqff"),
        "i.gguf": ("calibrate", "--model", chat, "--text", tmp_path / "text", "--out", tmp_path / "i.gguf"),
        "adapter": ("finetune", "--model", chat, "--data", tmp_path / "data", "--out", tmp_path / "adapter", *LEARN),
    }
    given = json.dumps([[*map(str, command)] for command in commands.values()])
    done = Forked(FULL_DISK, given).finished()
    assert done.returncode == 0, done.stderr
    for name, (code, said) in zip(commands, json.loads(done.stdout), strict=True):
        assert (code, said.count("\n")) == (2, 1), said
        assert re.fullmatch(rf"error: {tmp_path / name}: not written: .*File too large.*\n", said), said
        assert ("the same command goes on from there" in said) == (name != "i.gguf")
        assert not (tmp_path / name).exists() and not (tmp_path / f"{name}.sha256").exists()
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {f".{name}.partial" for name in commands if name != "i.gguf"}
    assert not list((tmp_path / ".adapter.partial" / "content").glob("checkpoint-*"))  # none was complete


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_to_a_full_disk_is_one_line():
    command, buffered = [sys.executable, "-m", "jaxllm", "--help"], os.environ | {"PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=buffered, text=True, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (2, "error: not written: [Errno 28] No space left on device\n")
        done = subprocess.run(command, env=buffered, stdout=full, stderr=full)
        assert done.returncode == 2
