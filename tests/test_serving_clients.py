"""Clients that others wrote, against a live server: OpenAI's for JavaScript, and a checker of the protocol."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import covering
import pytest
from live_server import EOS, SAY, serving
from tiny_chat import TOKENS, write_chat

from jaxllm.engine.engine import Engine
from jaxllm.structured import Constraint

SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const fields = { model: "tiny", messages: JSON.parse(process.argv[3]), max_tokens: 12, temperature: 0 };
const whole = (await client.chat.completions.create(fields)).choices[0].message.content;
const streaming = { ...fields, stream: true, stream_options: { include_usage: true } };
let streamed = "", usage;
for await (const chunk of await client.chat.completions.create(streaming)) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const input = { model: "tiny", input: fields.messages, max_output_tokens: 12, temperature: 0 };
const response = (await client.responses.create(input)).output_text;
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const other = client.chat.completions.create({ ...fields, model: "other" });
const refused = await other.catch((error) => [error.status, error.code]);
console.log(JSON.stringify({ whole, streamed, usage, response, models, refused }));
"""

pytestmark = pytest.mark.skipif(not covering.FULL, reason="asks a registry for packages: --full")


class Ending(Engine):
    """Answers are words if nothing else is asked for, and strings end soon: a random model would go on for ever."""

    def add(self, prompt, max_new_tokens, *, constraint, **options):
        constraint = constraint or Constraint.regex("[a-z]{5,9}")
        bias = {"logit_bias": {TOKENS.index('"'): 8.0, EOS: 20.0}}
        return super().add(prompt, max_new_tokens, constraint=constraint, **options | bias)


@pytest.fixture(scope="module")
def model(tmp_path_factory, load_once):
    return load_once(write_chat(tmp_path_factory.mktemp("clients") / "tiny.gguf"), dtype="float32")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_openai_for_javascript(model, tmp_path):
    subprocess.run(["npm", "install", "--silent", "openai@6"], cwd=tmp_path, check=True)
    (tmp_path / "client.mjs").write_text(SCRIPT)
    with serving(model) as live:
        command = ["node", "client.mjs", live.url, json.dumps(SAY)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    got = json.loads(done.stdout)
    text = model.chat(SAY, 12, temperature=0).text
    assert [got[name] for name in ("whole", "streamed", "response")] == [text] * 3
    assert (got["usage"]["completion_tokens"], got["models"], got["refused"]) == (
        12,
        ["tiny"],
        [404, "model_not_found"],
    )


FAILING = {"openai-chat": {"chat-image-input"}, "open-responses": {"image-input"}}  # no model here sees anything


@pytest.mark.parametrize("form", FAILING)
def test_the_protocol_is_complied_with(model, form):
    command = Path(sys.executable).with_name("llm-comply")
    if not command.exists():
        pytest.skip("llm-comply is not installed")
    with serving(model, Ending) as live:
        options = ["--base-url", live.url, "--api-key", "none", "--model", "tiny", "--format", form, "--json"]
        report = json.loads(subprocess.run([command, *options], capture_output=True, text=True).stdout)
    failed = {result["id"]: result["errors"] for result in report["results"] if result["status"] == "failed"}
    assert failed.keys() == FAILING[form], failed
    assert report["summary"]["passed"] >= 7
    assert all("schema" not in error for errors in failed.values() for error in errors)
