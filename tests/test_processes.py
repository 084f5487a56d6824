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

import numpy as np
import pytest
from compiled import QUICK
from covering import some
from forked import Forked

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


COMMAND = "import sys\nfrom jaxllm.cli import main\nsys.exit(main(sys.argv[1:]))"


def told(count, port=None):
    """What torchrun tells each of `count` processes of the others."""
    port = port or free_port()
    common = {"JAXLLM_WAIT": "90", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(i)} for i in range(count)]


def finished(count, code, *args, environments=None, each=lambda i: ()):
    """Exit code, stdout and stderr of `count` processes that run the code, each with more arguments of its own."""
    environments = environments or told(count)
    started = [Forked(code, *args, *each(i), environment=environments[i]) for i in range(count)]
    return [(done.returncode, done.stdout, done.stderr) for done in [process.finished() for process in started]]


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
group = processes.join(where)
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
group.leave()
jax.distributed.shutdown()
"""


MESHES = ("tp=4,ep=2", "tp=2,ep=4", "dp=2,tp=4", "tp=8")
FULL = [(count, [(name, mesh, 6) for name, mesh in zip((*MODELS, DEMO), MESHES, strict=True)]) for count in (2, 4)]
# Experts and scales over both processes; a dense model over four.
FEW = [(2, [("deepseek/v3_fp8", "tp=2,ep=4", 0)]), (4, [(SIMPLE, "tp=4,ep=2", 0)])]


@pytest.mark.parametrize(("count", "models"), some(FULL, FEW))
def test_scripts_of_several_processes(count, models, load_once):
    """The same script in each: every process has the tokens, and reads what its devices hold and no more. Of some
    models only those that are likeliest after each of a prompt's: that takes fewer programs."""
    todo = [[str(GOLDEN / name), mesh, most] for name, mesh, most in models]
    results = finished(count, LIBRARY, json.dumps(todo))
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


GENERATE = ("generate", "--model", SIMPLE, "--dtype", "float32", "--tp", 4)


def generate(*options, **more):
    return finished(2, COMMAND, *GENERATE, *options, **more)


def test_the_command_prints_in_process_0_alone(tmp_path):
    """Here the processes are told by Slurm that there are two."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_NODES": "1", "JAXLLM_WAIT": "90"}
    jobs = [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    golden = np.load(SIMPLE / "golden.npz")
    prompt, greedy = golden["tokens"][0].tolist(), golden["greedy"].tolist()
    (lines := tmp_path / "lines").write_text("\n".join(" ".join(map(str, [*prompt, *greedy[:n]])) for n in (0, 4)))
    given = ("--tp", 2, "--coordinator", "auto", "--input-file", lines, "--json", "--max-new-tokens", 6)
    results = generate(*given, environments=jobs)
    assert [(code, err) for code, _, err in results] == [(0, "")] * 2
    assert results[1][1] == ""
    assert [json.loads(line)["tokens"] for line in results[0][1].splitlines()] == [greedy[:6], greedy[4:10]]


def test_a_conversation_and_a_loss(short_demo):
    """Interrupted in its first turn: all stop at the same token, and go on. Killed in the third: all end."""
    given = ("--model", short_demo, "--interactive", "--max-new-tokens", 2000, "--tp", 2)
    command = [sys.executable, "-m", "jaxllm", "generate", *map(str, given)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environments = [{**os.environ, **QUICK, **own} for own in told(2)]
    leader, other = (subprocess.Popen(command, text=True, env=env, **pipes) for env in environments)

    def turn(text):
        leader.stdin.write(text)
        leader.stdin.flush()
        assert leader.stdout.read(12)

    try:
        turn("Count to three hundred.\n")
        leader.send_signal(signal.SIGINT)
        turn("Say hello.\n")
        leader.send_signal(signal.SIGINT)
        turn("Count to four hundred.\n")
        other.kill()
        begun = time.monotonic()
        _, err = leader.communicate(timeout=60)
        assert time.monotonic() - begun < 60
        out, _ = other.communicate()
    finally:
        leader.kill()
        other.kill()
    stopped, lost = err.rpartition("\n")[0].rsplit("\n", 1)
    assert stopped.count("[stopped]") == 2
    said = "error: process 1: ended without a word; what it printed last may say why"
    assert (leader.returncode, lost, out) == (2, said, "")


def test_processes_that_were_started_differently():
    results = generate("--prompt-ids", "1,2", each=lambda i: ("--weights", "packed" if i else "float32"))
    expected = "error: process 1 has the option weights packed, process 0 has float32\n"
    assert results == [(2, "", expected)] * 2


def test_other_files(tmp_path):
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in SIMPLE.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1" / "config.json").write_text((tmp_path / "1" / "config.json").read_text() + " ")
    results = generate("--prompt-ids", "1,2", each=lambda i: ("--model", tmp_path / str(i)))
    for code, _, err in results:
        assert code == 2
        assert re.match(r"error: process 1 has the file config.json \d+ bytes \(\w+\), process 0 has \d+ bytes", err)


def test_nobody_there():
    """Each alone, told of two: process 0 waits for the other, the other for process 0."""
    port = free_port()
    environments = [environment | {"JAXLLM_WAIT": "1"} for environment in told(2, port)]
    expected = (
        f"error: in 1 s no process 1 of 2 came to 127.0.0.1:{port}\n",
        f"error: 127.0.0.1:{port}: in 1 s process 0 was not to be reached: Connection refused\n",
    )
    for environment, said in zip(environments, expected, strict=True):
        [(code, _, err)] = finished(1, COMMAND, *GENERATE, "--prompt-ids", "1", environments=[environment])
        assert (code, err) == (2, said)


def test_another_count():
    where = ("--coordinator", f"127.0.0.1:{free_port()}")

    def each(i):
        return ("--num-processes", 3 - i, "--process-id", i)

    alone = [{"JAXLLM_WAIT": "20"}] * 2
    results = generate("--prompt-ids", "1", *where, each=each, environments=alone)
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
    results = finished(2, COMMAND, "convert", source, target, "--to", "q8_0")
    assert [(code, out) for code, out, _ in results] == [(0, "")] * 2
    assert (results[0][2].count("tensors"), results[1][2]) == (1, "")
    assert jaxllm.load(target, progress=False).config.hidden_size == 32


def test_a_failure_of_one_is_known_to_all():
    """Here an instruction set that there is not, which only process 1 was told of."""
    first, second = told(2)
    environments = [first, second | {"JAXLLM_CPU": "abacus"}]
    results = generate("--prompt-ids", "1,2", environments=environments)
    (_, _, leader), (_, _, other) = results
    assert [code for code, _, _ in results] == [2, 2]
    assert other.startswith("error: JAXLLM_CPU=abacus")
    assert leader == f"error: process 1: {other.removeprefix('error: ')}"


def test_other_versions():
    """Process 1 believes that it has another JAX."""
    code = """
import os
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "0.0.1" if name == "jax" and os.environ["RANK"] == "1" else real(name)
"""
    results = finished(2, code + COMMAND, *GENERATE, "--prompt-ids", "1,2")
    expected = f"error: process 1 has the version of jax 0.0.1, process 0 has {version('jax')}\n"
    assert results == [(2, "", expected)] * 2
