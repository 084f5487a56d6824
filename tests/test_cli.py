"""The command line: its two output streams and its exit code. Few of these tests start processes, which is what its
users do; the others call the same `main`, and share what they loaded and compiled."""

import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from compiled import QUICK
from covering import some
from forked import Forked
from tiny_gguf import Tiny, reference_logits, write

import jaxllm
from jaxllm import bench, generate
from jaxllm.cli import COMMANDS, main

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2_hf_float32.json").read_text())
FRANCE = GOLDEN[1]
ANSWER = "The capital of France is Paris."


FLOAT, TP = ["--dtype", "float32"], ["--tp", "2"]


# Processes.


def start(*args, **options):
    """A process of the command line that knows nothing of pytest's eight devices."""
    environment = os.environ | QUICK
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *map(str, args)], text=True, env=environment, **streams)


def test_json_is_one_object_and_nothing_else(load_once, short_demo):
    given = ("--model", short_demo, "--prompt", FRANCE["prompt"], *FLOAT, "--json", *TP, "--max-new-tokens", 8)
    process = Forked("import sys; from jaxllm.cli import main; sys.exit(main(sys.argv[1:]))", "generate", *given)
    alone = load_once(short_demo, dtype="float32").chat([{"role": "user", "content": FRANCE["prompt"]}], 8)
    done = process.finished()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    got = json.loads(done.stdout)
    assert got.pop("prefill_tok_s") > 0
    assert got.pop("decode_tok_s") > 0
    assert got == {
        "prompt": FRANCE["prompt"],
        "text": alone.text,
        "tokens": alone.tokens,
        "prompt_tokens": 37,
        "cached_tokens": 0,
        "finish_reason": "length",
    }


def test_an_error_is_the_exit_code_of_the_process():
    process = start("-m", "jaxllm", "generate", "--model", "/no/such.gguf", "--prompt", "x")
    assert process.communicate(timeout=300) == ("", "error: /no/such.gguf: no such file\n")
    assert process.returncode == 2


def test_a_reader_that_has_left_is_no_error(untokenized):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("-m", "jaxllm.generate", "--model", untokenized[0], "--prompt-ids", "3,14", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")


def test_help_does_not_wait_for_jax():
    code = "import sys, jaxllm.cli; jaxllm.cli.main(['--help']); print({'jax', 'numpy', 'flax'} & set(sys.modules))"
    out, _ = start("-c", code).communicate(timeout=300)
    assert out.endswith("\nset()\n")


# The demo in this process.


@pytest.fixture
def run(monkeypatch, capsys, load_once):
    """`jaxllm generate` with the demo: exit code, stdout, stderr. What it loads is kept for other tests."""
    given = {"mesh": None, "dtype": None, "quantize": None, "weights": None, "max_seq_len": None, "attention": None}
    given["progress"] = True

    def load(path, **options):
        return load_once(path, **{name: value for name, value in options.items() if value != given.get(name)})

    def generate(*args, model="demo", stdin=""):
        monkeypatch.setattr("jaxllm.generate.load", load)
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return command(capsys, "generate", "--model", model, *args)

    return generate


def test_text_goes_to_stdout_and_rates_to_stderr(run, load_once, short_demo):
    model = some("demo", short_demo)
    alone = load_once(model, dtype="float32").chat([{"role": "user", "content": FRANCE["prompt"]}], 8).text
    code, out, err = run("--prompt", FRANCE["prompt"], *FLOAT, "--max-new-tokens", 8, model=model)
    assert (code, out) == (0, some(ANSWER, alone) + "\n")
    assert re.fullmatch(r"\[prompt 37 tokens, .*\]\n", err)  # no progress bars where nobody watches


def test_a_file_of_prompts_is_answered_in_order(run, load_once, short_demo, tmp_path):
    prompts = [g["prompt"] for g in GOLDEN]
    (tmp_path / "in.txt").write_text("\n\n".join(prompts) + "\n")
    given = ("--input-file", tmp_path / "in.txt", "--json", *FLOAT, "--max-new-tokens", 8)
    code, out, _ = run(*given, model=short_demo)
    got = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [g["prompt"] for g in got] == prompts
    model = load_once(short_demo, dtype="float32")
    alone = [model.chat([{"role": "user", "content": prompt}], 8).tokens for prompt in prompts]
    assert [g["tokens"] for g in got] == alone
    assert alone[0] != alone[1]


def test_a_conversation_through_stdin(run, short_demo):
    lines = [FRANCE["prompt"], "", "And what did I ask?", "/clear", FRANCE["prompt"], "/exit", "never read"]
    given = ("--interactive", "--json", *FLOAT, "--max-new-tokens", 8)
    code, out, _ = run(*given, model=short_demo, stdin="\n".join(lines))
    first, second, third = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert first["tokens"] == third["tokens"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + len(first["tokens"])  # it holds what was said before
    assert third["prompt_tokens"] == first["prompt_tokens"]
    assert first["cached_tokens"] == 0
    assert first["prompt_tokens"] <= second["cached_tokens"] < second["prompt_tokens"]


def test_a_conversation_that_outgrows_the_context_goes_on(run, short_demo):
    lines = [FRANCE["prompt"], "word " * 50, "/clear", FRANCE["prompt"]]
    given = ("--interactive", "--max-seq-len", 64, *FLOAT, "--max-new-tokens", 8)
    _, out, err = run(*given, model=short_demo, stdin="\n".join(lines))
    half = out[: len(out) // 2]
    assert out == 2 * half and len(half) > 8
    assert "error: the prompt has " in err
    assert "/clear starts a new conversation" in err


def test_raw_text_is_continued_as_it_stands(run, load_once, short_demo):
    text = "The capital of France is"
    _, out, _ = run("--raw", "--prompt", text, "--max-new-tokens", 1, "--json", *FLOAT, model=short_demo)
    got = json.loads(out)
    alone = load_once(short_demo, dtype="float32").generate(text, 1).text
    assert (got["prompt_tokens"], got["text"]) == (5, alone)


ERRORS = {
    "attention": (["--prompt", "x", "--attention", "naive"], "attention 'naive' means nothing for models like", "demo"),
    "missing file": (["--prompt", "x"], "no such file", "/no/such.gguf"),
    "an empty directory": (["--prompt", "x"], "tests/config.json: No such file", str(Path(__file__).parent)),
    "not a GGUF file": (["--prompt", "x"], "not a GGUF file", __file__),
    "no prompt": ([], "one of the arguments --prompt --prompt-ids --input-file --interactive is required", "demo"),
    "unknown option": (["--prompt", "x", "--frobnicate"], "unrecognized arguments: --frobnicate", "demo"),
    "not a number": (["--prompt", "x", "--top-k", "many"], "invalid int value: 'many'", "demo"),
    "no such prompts": (["--input-file", "/no/prompts"], "/no/prompts: No such file", "demo"),
    "prompts that are not text": (["--input-file", sys.executable], "codec can't decode", "demo"),
    "no devices": (["--prompt", "x", "--tp", "0"], "--tp, --ep and --dp must be 1 or above", "demo"),
    "negative temperature": (["--prompt", "x", *FLOAT, "--temperature", "-1"], "temperature=-1.0: must be", "demo"),
    "no such cache": (["--prompt", "x", "--cache-dtype", "int4"], "invalid choice: 'int4' (choose from", "demo"),
    "no tokens": (["--prompt", "x", *FLOAT, "--max-new-tokens", "0"], "max_new_tokens=0: must be", "demo"),
    "prompt too long": (["--prompt", "x " * 9999, *FLOAT], "but the context holds 8192", "demo"),
    "empty prompt": (["--prompt", "", "--raw", *FLOAT], "the prompt is empty", "demo"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_exit_code_2(run, short_demo, name):
    args, message, model = ERRORS[name]
    code, out, err = run(*args, model=short_demo if model == "demo" else model)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(run):
    """Python shows that of what leaves `main`."""
    with pytest.raises(jaxllm.InputError, match="no such file"):
        run("--prompt", "x", "--debug", model="/no/such.gguf")


@pytest.mark.optimized
def test_what_a_newcomer_sees(run):
    """`make run` shows an answer that is drawn, ends by itself and does not go in circles, and how fast it went. Its
    beginning is enough without --full."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    options, prompt = (re.search(rf"^{name} .?= (.*)$", makefile, re.M)[1] for name in ("SAMPLING", "PROMPT"))
    _, out, err = run("--prompt", prompt, *options.split(), *some([], ["--max-new-tokens", "20"]))
    assert out.startswith("The night was setting, and the ocean stretched out before us")
    assert re.fullmatch(r"\[.*prompt .* tok/s; answer \d+ tokens, .* tok/s; (stop|length)\]\n", err)
    words = out.split()
    assert len(words) > some(50, 10) and err.endswith(some("stop]\n", "length]\n"))
    fours = list(zip(*(words[i:] for i in range(4)), strict=False))
    assert len(set(fours)) == len(fours)


# A model without a tokenizer, and the commands.


@pytest.fixture(scope="module")
def untokenized(tmp_path_factory):
    """A tiny model without a tokenizer; the numpy model's greedy answers to its prompts."""
    path, tiny = tmp_path_factory.mktemp("cli") / "m.gguf", Tiny(layers=1)
    weights = write(path, tiny)

    def answer(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(np.argmax(reference_logits(tiny, weights, tokens)[-1])))
        return tokens[len(prompt) :]

    return path, answer


def command(capsys, *argv):
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err


GENERATE = ["--max-new-tokens", 5, "--dtype", "float32", "--weights", "packed"]


def test_prompts_and_answers_are_ids_without_a_tokenizer(run, untokenized):
    path, answer = untokenized
    code, out, err = run("--prompt-ids", "3, 14,15", *GENERATE, model=path)
    assert (code, out) == (0, ",".join(map(str, answer([3, 14, 15], 5))) + "\n")
    assert "[prompt 3 tokens, " in err
    assert "answer 5 tokens" in err


def test_lines_of_ids(run, tmp_path, untokenized):
    path, answer = untokenized
    (tmp_path / "in.txt").write_text("3,14,15\n\n9 2\n")
    code, out, _ = run("--input-file", tmp_path / "in.txt", "--json", *GENERATE, model=path)
    got = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(g["prompt"], g["tokens"]) for g in got] == [(p, answer(p, 5)) for p in ([3, 14, 15], [9, 2])]
    _, out, _ = run("--input-file", tmp_path / "in.txt", *GENERATE, model=path)
    assert out.splitlines()[:2] == ["> 3,14,15", ",".join(map(str, answer([3, 14, 15], 5)))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-ids", "3,x"], "--prompt-ids: '3,x' is not a list of token ids such as 1,2,3"),
        (["--prompt-ids", ""], "the prompt is empty"),
        (["--prompt-ids", "3,50"], "token ids must be 0 to 49, got 3 to 50"),
        (["--prompt", "hello"], "m.gguf has no tokenizer: give --prompt-ids, or lines of token ids in --input-file"),
        (["--prompt-ids", "3", "--top-p", "2"], "top_p=2.0: must be above 0 and at most 1"),
    ],
)
def test_ids_that_cannot_be_used(capsys, untokenized, options, message):
    code, out, err = command(capsys, "generate", "--model", untokenized[0], *options)
    assert (code, out, err) == (2, "", f"error: {message}\n")


def test_the_commands(capsys):
    code, out, _ = command(capsys, "--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert command(capsys) == (0, out, "")
    assert command(capsys, "--version") == (0, f"jaxllm {version('jaxllm')}\n", "")
    code, out, err = command(capsys, "frobnicate", "--help")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no command 'frobnicate'; commands are generate, serve, convert, calibrate, finetune, perplexity" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: jaxllm {name} ")


def test_the_package_as_it_is_installed():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    module, function = project["project"]["scripts"]["jaxllm"].split(":")
    assert getattr(importlib.import_module(module), function) is main
    [typed] = project["tool"]["setuptools"]["package-data"]["jaxllm"]
    assert (Path(jaxllm.__file__).parent / typed).is_file()
    assert jaxllm.__version__ == project["project"]["version"]
    assert bench.PEER_SCRIPT.parent == Path(bench.__file__).parent
    for name in jaxllm.__all__:
        assert getattr(jaxllm, name) is not None
    assert callable(jaxllm.quantize)  # no module's name


def test_an_engine_that_is_missing_is_one_line(untokenized):
    args = bench.parser().parse_args(["--decode", "2", "--repeats", "1", "--peers", sys.executable])
    with pytest.raises(jaxllm.InputError, match="^llama.cpp: peer_bench: llama.cpp is not installed: .*$"):
        bench.peer("llama.cpp", None, 8, untokenized[0], args)


def test_the_bench_keeps_its_rows(monkeypatch, untokenized, tmp_path, capsys):
    """Each engine beside ours with the same prompt; slow engines only with short ones."""
    rates = {"prefill_tok_s": 100.0, "decode_tok_s": 10.0}
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench, "measure", lambda model, prefill, decode, repeats: rates)
    monkeypatch.setattr(bench, "peer", lambda *args: {"version": "1", "prefill_tok_s": 50.0, "decode_tok_s": 20.0})
    monkeypatch.setattr(bench, "measure_startup", lambda *args: SimpleNamespace(cold=2, warm=1, deepseek_v3=3))
    rows = tmp_path / "rows.jsonl"
    options = ["--model", str(untokenized[0]), "--prefill", "32", "1024", "--peers", "python", "--json", str(rows)]
    bench.run(bench.parser().parse_args(options))
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [32] * 5 + [1024] * 3
    others = {"llama.cpp", "mistral.rs", "mistral.rs, q8_0", "mistral.rs, q4k"}
    assert {row["engine"] for row in kept} == others | {"jaxllm"}
    assert all(row["processor"] and row["decode"] == 64 for row in kept)
    printed = capsys.readouterr().out
    assert printed.count("2.00x") == printed.count("0.50x") == 6
    options[-1] = str(tmp_path / "missing" / "rows.jsonl")
    with pytest.raises(jaxllm.InputError, match="rows.jsonl: No such file"):
        bench.run(bench.parser().parse_args(options))


def test_the_command_line_has_the_defaults_of_load():
    args = generate.parser().parse_args(["--model", "demo", "--prompt", "x"])
    defaults = {name: p.default for name, p in inspect.signature(jaxllm.load).parameters.items()}
    assert all(
        getattr(args, name) == defaults[name] for name in ("dtype", "weights", "matmul", "quantize", "attention")
    )
