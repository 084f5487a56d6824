"""The command line as its users run it: a process, its two output streams and its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2_hf_float32.json").read_text())
FRANCE = GOLDEN[1]
ANSWER = "The capital of France is Paris."


def run(*args, stdin="", model="demo"):
    command = [sys.executable, "-m", "jaxllm.generate", "--model", model, *args]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=300)


def test_text_goes_to_stdout_and_rates_to_stderr():
    done = run("--prompt", FRANCE["prompt"], "--dtype", "float32")
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n")
    assert "prompt 37 tokens" in done.stderr
    assert "Traceback" not in done.stderr
    assert "%|" not in done.stderr  # no progress bars where nobody watches


def test_json_is_one_object_and_nothing_else():
    done = run("--prompt", FRANCE["prompt"], "--dtype", "float32", "--json", "--tp", "2")
    assert done.stdout.count("\n") == 1
    got = json.loads(done.stdout)
    assert got.pop("prefill_tok_s") > 0
    assert got.pop("decode_tok_s") > 0
    assert got == {
        "prompt": FRANCE["prompt"],
        "text": ANSWER,
        "tokens": FRANCE["new"],
        "prompt_tokens": 37,
        "finish_reason": "stop",
    }


def test_a_file_of_prompts_is_answered_in_order(tmp_path):
    prompts = [g["prompt"] for g in GOLDEN]
    (tmp_path / "in.txt").write_text("\n\n".join(prompts) + "\n")
    done = run("--input-file", str(tmp_path / "in.txt"), "--json", "--dtype", "float32", "--max-new-tokens", "12")
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert [g["prompt"] for g in got] == prompts
    assert [g["tokens"] for g in got] == [g["new"][:12] for g in GOLDEN]
    assert [g["finish_reason"] for g in got] == ["length", "stop"]


def test_a_conversation_through_a_pipe():
    lines = [FRANCE["prompt"], "", "And what did I ask?", "/clear", FRANCE["prompt"], "/exit", "never read"]
    done = run("--interactive", "--json", "--dtype", "float32", "--max-new-tokens", "8", stdin="\n".join(lines))
    first, second, third = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert first["tokens"] == third["tokens"] == FRANCE["new"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + len(first["tokens"])  # it holds what was said before
    assert third["prompt_tokens"] == first["prompt_tokens"]


def test_a_conversation_that_outgrows_the_context_goes_on():
    lines = [FRANCE["prompt"], "word " * 50, "/clear", FRANCE["prompt"]]
    done = run("--interactive", "--max-seq-len", "64", "--dtype", "float32", stdin="\n".join(lines))
    assert done.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert "error: the prompt has " in done.stderr
    assert "/clear starts anew" in done.stderr


def test_raw_text_is_continued_as_it_stands():
    done = run("--raw", "--prompt", "The capital of France is", "--max-new-tokens", "1", "--json", "--dtype", "float32")
    got = json.loads(done.stdout)
    assert (got["prompt_tokens"], got["text"]) == (5, " Paris")


def test_a_reader_that_leaves_early_is_no_error():
    ours = f"{sys.executable} -m jaxllm.generate --model demo --prompt 'Count to 100.'"
    command = ["bash", "-c", f"{ours} | head -c 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


ERRORS = {
    "missing file": (["--prompt", "x"], "no such file", "/no/such.gguf"),
    "an empty directory": (["--prompt", "x"], "tests/config.json: No such file", str(Path(__file__).parent)),
    "not a GGUF file": (["--prompt", "x"], "not a GGUF file", __file__),
    "no prompt": ([], "one of the arguments --prompt --input-file --interactive is required", "demo"),
    "unknown option": (["--prompt", "x", "--frobnicate"], "unrecognized arguments: --frobnicate", "demo"),
    "not a number": (["--prompt", "x", "--top-k", "many"], "invalid int value: 'many'", "demo"),
    "no such prompts": (["--input-file", "/no/prompts"], "/no/prompts: No such file", "demo"),
    "prompts that are not text": (["--input-file", sys.executable], "codec can't decode", "demo"),
    "no devices": (["--prompt", "x", "--tp", "0"], "--tp and --ep must be 1 or above", "demo"),
    "negative temperature": (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0: must be", "demo"),
    "no tokens": (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0: must be", "demo"),
    "prompt too long": (["--prompt", "x " * 99, "--max-seq-len", "64"], "but the context holds 64", "demo"),
    "empty prompt": (["--prompt", "", "--raw"], "the prompt is empty", "demo"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_exit_code_2(name):
    args, message, model = ERRORS[name]
    done = run(*args, model=model)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback():
    assert "Traceback" in run("--prompt", "x", "--debug", model="/no/such.gguf").stderr
