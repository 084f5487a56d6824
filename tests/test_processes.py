"""Several processes that run one model: real ones, connected over loopback with gloo's collectives.

Their tokens have to be those of one process with one device. What goes wrong ends every process with one line.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from compiled import QUICK
from covering import some

import jaxllm
from jaxllm.errors import InputError
from jaxllm.loading import find_checkpoint
from jaxllm.meeting import Launch
from jaxllm.processes import launch

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["checkpoints/qwen3_moe", "deepseek/v3_fp8", "gpt_oss/mxfp4"]
DEMO = find_checkpoint("demo")
SIMPLE = GOLDEN / "checkpoints" / "llama"
PROMPT = [1, 2, 3, 4, 5]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(count, *args, environment=None, each=lambda i: (), own=lambda i: {}, torchrun=True):
    """`count` processes of `python *args`, each with more arguments and variables of its own; by default torchrun's,
    which tell of one another."""
    port = free_port()
    base = {**os.environ, **QUICK, "JAX_PLATFORMS": "cpu", "JAXLLM_WAIT": "90", **(environment or {})}
    started = []
    for i in range(count):
        told = {"WORLD_SIZE": str(count), "RANK": str(i), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *map(str, (*args, *each(i)))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, env=base | own(i) | (told if torchrun else {}), **pipes))
    return started


def finished(started, stdin="", timeout=280):
    """Exit code, stdout and stderr of each."""
    started[0].stdin.write(stdin)
    for process in started:
        process.stdin.close()
        process.stdin = None
    try:
        return [(p.returncode, out, err) for p in started for out, err in [p.communicate(timeout=timeout)]]
    finally:
        for process in started:  # where one hangs, none is left behind
            process.kill()
            process.communicate()


LIBRARY = """
import json, os, sys
import jax
from jaxllm import placing, processes

read = []
fill = placing._fill
def counted(leaf, index, part, out):
    read.append(out.nbytes)
    fill(leaf, index, part, out)
placing._fill = counted

where = processes.launch(None, None, None, os.environ)
processes.join(where)
jax.config.update("jax_num_cpu_devices", 8 // where.count)
import jaxllm
for path, mesh, most in json.loads(sys.argv[1]):
    read.clear()
    model = jaxllm.load(path, mesh=mesh, dtype="float32", progress=False)
    here = sum(shard.data.nbytes for p in model.placed for leaf in jax.tree.leaves(p.weight)
               for shard in leaf.addressable_shards)
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    if most:
        tokens = [answer.tokens for answer in model.generate(prompts, most, eos_ids=())]
    else:
        tokens = model.logits(prompts[:1]).argmax(-1).tolist()
    print(json.dumps([tokens, sum(read), here]), flush=True)
jax.distributed.shutdown()
"""


FULL = [(count, [(name, 6) for name in (*MODELS, DEMO)]) for count in (2, 4)]
FEW = [(2, [(MODELS[0], 6), (MODELS[1], 0), (MODELS[2], 0)]), (4, [(SIMPLE, 0)])]


@pytest.mark.parametrize(("count", "models"), some(FULL, FEW))
def test_scripts_of_several_processes(count, models, load_once):
    """The same script in each: every process has the tokens, and reads what its devices hold and no more. Of some
    models only those that are likeliest after each of a prompt's: that takes fewer programs."""
    meshes = ("tp=4,ep=2", "tp=2,ep=4", "dp=2,tp=4", "tp=8")
    todo = [[str(GOLDEN / name), mesh, most] for (name, most), mesh in zip(models, meshes, strict=False)]
    results = finished(start(count, "-c", LIBRARY, json.dumps(todo)))
    expected = []
    for path, _, most in todo:
        alone = load_once(path, dtype="float32")
        answers = alone.generate([PROMPT, [7, 8]], most, eos_ids=()) if most else []
        expected.append([a.tokens for a in answers] or alone.logits([PROMPT]).argmax(-1).tolist())
    for code, out, err in results:
        assert code == 0, err
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("[[")]
        assert [tokens for tokens, _, _ in lines] == expected
        assert all(read <= held for _, read, held in lines)


def generate(count, *options, stdin="", **more):
    given = ("-m", "jaxllm", "generate", "--model", SIMPLE, "--dtype", "float32", "--tp", 4, *options)
    return finished(start(count, *given, **more), stdin)


def test_the_command_prints_in_process_0_alone(load_once, tmp_path):
    (lines := tmp_path / "lines").write_text("1,2,3,4,5\n7 8\n")
    results = generate(2, "--input-file", lines, "--json", "--max-new-tokens", 6)
    assert [(code, err) for code, _, err in results] == [(0, "")] * 2
    assert results[1][1] == ""
    alone = load_once(SIMPLE, dtype="float32").generate([PROMPT, [7, 8]], 6)
    assert [json.loads(line)["tokens"] for line in results[0][1].splitlines()] == [answer.tokens for answer in alone]


def test_processes_that_jax_finds(load_once):
    """By Slurm's variables."""

    def slurm(i):
        return {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}

    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_NODES": "1"}
    given = ("--tp", 2, "--coordinator", "auto", "--prompt-ids", "1,2,3,4,5", "--max-new-tokens", 6)
    results = generate(2, *given, torchrun=False, environment=job, own=slurm)
    assert [(code, out) for code, out, _ in results[1:]] == [(0, "")]
    alone = load_once(SIMPLE, dtype="float32").generate(PROMPT, 6)
    assert results[0][:2] == (0, ",".join(map(str, alone.tokens)) + "\n")


def test_a_conversation_and_a_loss(short_demo):
    """Interrupted in its first turn: all stop at the same token, and go on. Killed in the third: all end."""
    demo = ("-m", "jaxllm", "generate", "--model", short_demo, "--interactive", "--max-new-tokens", 2000)
    leader, other = start(2, *demo, "--tp", 2)

    def turn(text):
        leader.stdin.write(text)
        leader.stdin.flush()
        assert leader.stdout.read(12)

    turn("Count to three hundred.\n")
    leader.send_signal(signal.SIGINT)
    turn("Say hello.\n")
    leader.send_signal(signal.SIGINT)
    turn("Count to four hundred.\n")
    other.kill()
    begun = time.monotonic()
    (code, _, err), (_, out, _) = finished([leader, other])
    assert time.monotonic() - begun < 60
    stopped, lost = err.rpartition("\n")[0].rsplit("\n", 1)
    assert stopped.count("[stopped]") == 2
    assert (code, lost, out) == (2, "error: process 1: ended without a word; what it printed last may say why", "")


def test_processes_that_were_started_differently():
    results = generate(2, "--prompt-ids", "1,2", each=lambda i: ("--weights", "packed" if i else "float32"))
    expected = "error: process 1 has the option weights packed, process 0 has float32\n"
    assert results == [(2, "", expected)] * 2


def test_other_files(tmp_path):
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in SIMPLE.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1" / "config.json").write_text((tmp_path / "1" / "config.json").read_text() + " ")
    results = generate(2, "--prompt-ids", "1,2", each=lambda i: ("--model", tmp_path / str(i)))
    for code, _, err in results:
        assert code == 2
        assert re.match(r"error: process 1 has the file config.json \d+ bytes \(\w+\), process 0 has \d+ bytes", err)


def test_nobody_there():
    """Each alone, told of two: process 0 waits for the other, the other for process 0."""
    port = free_port()
    for index, expected in (
        (0, f"error: in 2 s no process 1 of 2 came to 127.0.0.1:{port}\n"),
        (1, f"error: 127.0.0.1:{port}: in 2 s process 0 was not to be reached: Connection refused\n"),
    ):
        where = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", index)
        [(code, _, err)] = generate(1, "--prompt-ids", "1", *where, torchrun=False, environment={"JAXLLM_WAIT": "2"})
        assert (code, err) == (2, expected)


def test_another_count():
    port = free_port()

    def where(i):
        return ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 3 - i, "--process-id", i)

    results = generate(2, "--prompt-ids", "1", each=where, torchrun=False, environment={"JAXLLM_WAIT": "20"})
    expected = "error: process 1 was told of 2 processes, process 0 of 3\n"
    assert [(code, err) for code, _, err in results] == [(2, expected)] * 2


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ((None, None, None), {}, None),
        ((None, None, None), {"WORLD_SIZE": "1"}, None),
        (("h:1", 1, 0), {}, None),
        (("h:8476", 2, 1), TORCHRUN, Launch("h", 8476, 2, 1)),
        ((None, None, None), TORCHRUN, Launch("node0", 29500, 4, 3)),
        ((None, None, None), TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Launch("node0", 29501, 4, 3)),
    ],
)
def test_how_it_was_started(options, environment, expected):
    assert launch(*options, environment) == expected


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("h:1", None, 0), {}, "--coordinator HOST:PORT, --num-processes and --process-id belong together"),
        (("h", 2, 0), {}, "the port of --coordinator is 'h', not a number"),
        ((":5", 2, 0), {}, "--coordinator :5: expected HOST:PORT, such as 10.0.0.1:8476"),
        (("h:5", 2, 2), {}, "process 2 of 2: they are numbered from 0"),
        ((None, None, None), {"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not MASTER_ADDR, MASTER_PORT, RANK: "),
        ((None, None, None), TORCHRUN | {"RANK": "x"}, "RANK is 'x', not a number"),
    ],
)
def test_impossible_starts(options, environment, message):
    with pytest.raises(InputError, match=re.escape(message)):
        launch(*options, environment)


def test_converting_is_done_once(tmp_path):
    source, target = GOLDEN / "checkpoints" / "llama", tmp_path / "made.gguf"
    results = finished(start(2, "-m", "jaxllm.convert", source, target, "--to", "q8_0"))
    assert [(code, out) for code, out, _ in results] == [(0, "")] * 2
    assert (results[0][2].count("tensors"), results[1][2]) == (1, "")
    assert jaxllm.load(target, progress=False).config.hidden_size == 32


def test_a_failure_of_one_is_known_to_all():
    """Here an instruction set that there is not, which only process 1 was told of."""
    results = generate(2, "--prompt-ids", "1,2", own=lambda i: {"JAXLLM_CPU": "abacus"} if i else {})
    (_, _, leader), (_, _, other) = results
    assert [code for code, _, _ in results] == [2, 2]
    assert other.startswith("error: JAXLLM_CPU=abacus")
    assert leader == f"error: process 1: {other.removeprefix('error: ')}"


def test_other_versions(tmp_path):
    """Process 1 believes that it has another JAX."""
    code = "from importlib import metadata\nreal = metadata.version\n"
    code += "metadata.version = lambda name: '0.0.1' if name == 'jax' else real(name)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    results = generate(2, "--prompt-ids", "1,2", own=lambda i: {"PYTHONPATH": str(tmp_path)} if i else {})
    expected = f"error: process 1 has the version of jax 0.0.1, process 0 has {version('jax')}\n"
    assert results == [(2, "", expected)] * 2
