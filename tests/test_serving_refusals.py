"""Bad input, clients that do not behave, and what becomes of the next request: it is answered."""

import http.client
import json
import signal
import socket
import time

import openai
import pytest
from live_server import CHAT, EOS, QUEUE, SAY, SLOTS, Breaking, Slow, Stuck, serving
from test_cli import start
from tiny_chat import write_chat

from jaxllm.cli import main
from jaxllm.serving import connection


@pytest.fixture(scope="module")
def model(tmp_path_factory, load_once):
    return load_once(write_chat(tmp_path_factory.mktemp("serving") / "tiny.gguf"), dtype="float32")


@pytest.fixture(scope="module")
def live(model):
    with serving(model) as live:
        yield live


# What is refused, always in the same shape, and always so that the next request is answered.

PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions", "responses": "/v1/responses"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
BROKEN_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{"}}


def raw(message, body):
    return "chat", body, 400, message


def chat(message, status=400, **fields):
    return "chat", {"model": "tiny", "messages": SAY, **fields}, status, message


def turn(message, **fields):
    return chat(message, messages=[{"role": "user", "content": "x", **fields}])


def schema(message, **schema):
    return chat(message, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def text(message, **fields):
    return "text", {"model": "tiny", "prompt": "x", **fields}, 400, message


def response(message, **fields):
    return "responses", {"model": "tiny", "input": "x", **fields}, 400, message


BAD = {
    "no JSON": raw("Invalid JSON", b'{"model": "tiny", '),
    "no text": raw("Invalid JSON", b"\xff\xfe\x00"),
    "half a character": raw("Invalid JSON", b'{"model": "\\ud800"}'),
    "deep": raw("Invalid JSON", b"[" * 80_000),
    "nothing": raw("Invalid JSON", b""),
    "a list": raw("should be an object", b"[]"),
    "infinity": raw("temperature: ", b'{"temperature": 1e999, "model": "tiny", "messages": [{"role": "user"}]}'),
    "no fields": raw("model: Field required", b"{}"),
    "another model": chat("there is no model 'gpt-4' here, only 'tiny'", 404, model="gpt-4"),
    "no messages": chat("messages: ", messages=[]),
    "another role": turn("messages.0.role: ", role="cat"),
    "an image": turn("messages.0.content.0.type: 'image_url' is not understood here, only text", content=[IMAGE]),
    "a long prompt": turn("tokens", content="x" * 2000),
    "a broken call": turn("arguments: ", role="assistant", tool_calls=[BROKEN_CALL]),
    "an unknown field": chat("colour: Extra inputs", colour="red"),
    "negative tokens": chat("max_tokens: ", max_tokens=-1),
    "no tokens": chat("max_completion_tokens: ", max_completion_tokens=0),
    "tokens as text": chat("max_tokens: ", max_tokens="many"),
    "temperature": chat("temperature=-1", temperature=-1),
    "top_p": chat("top_p=7", top_p=7, temperature=1),
    "penalty": chat("presence_penalty: ", presence_penalty=3),
    "no choices": chat("n: ", n=0),
    "too many choices": chat("9 answers to one request: there is room for 8", n=SLOTS + QUEUE + 1),
    "top_logprobs alone": chat("top_logprobs needs logprobs", top_logprobs=2),
    "too many top_logprobs": chat("top_logprobs: ", logprobs=True, top_logprobs=21),
    "an empty stop": chat("stop: ", stop=""),
    "a bias too large": chat("logit_bias.3: ", logit_bias={"3": 101}),
    "a bias for no token": chat("logit_bias: ", logit_bias={"99999": 1}),
    "a huge seed": chat("seed: ", seed=2**63),
    "a tool of another kind": chat("tools.0", tools=[{"type": "web_search"}]),
    "very many tools": chat("tools", tools=[{"type": "function", "function": {"name": "a"}}] * 1025),
    "a choice without tools": chat("tool", tool_choice="required"),
    "a choice that is no tool": chat(
        "jump", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "jump"}}
    ),
    "tools and a form": chat("response_format", tools=[TOOL], response_format={"type": "json_object"}),
    "no schema": chat("json_schema: Field required", response_format={"type": "json_schema"}),
    "a schema of no type": schema("colour", type="colour"),
    "a schema that nothing satisfies": schema("Unsatisfiable", allOf=[{"type": "string"}, {"type": "null"}]),
    "a schema that explodes": schema("too long to compile", type="integer", multipleOf=1_000_003),
    "a variable with a field": chat("'tools' has a field of its own", chat_template_kwargs={"tools": []}),
    "no prompt": text("prompt: Field required", prompt=None),
    "very many prompts": text("12000 answers to one request", prompt=["x"] * 6000, n=2),
    "an id that no token has": text("prompt", prompt=[2**62], echo=True),
    "an empty prompt": text("empty", prompt=""),
    "no prompts": text("empty", prompt=[]),
    "ids outside the vocabulary": text("999999", prompt=[1, 999_999]),
    "ids and texts": text("prompt", prompt=[1, "x"]),
    "a suffix": text("suffix: ", suffix="y"),
    "log-probabilities of the prompt": text("echo", echo=True, logprobs=1),
    "an item of another kind": response("input.0: ", input=[{"type": "computer_call"}]),
    "no input": response("input: Field required", input=None),
    "empty input": response("messages: ", input=[]),
    "a stored conversation": response("previous_response_id: ", previous_response_id="resp_1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(live, name):
    where, body, status, message = BAD[name]
    begun = time.monotonic()
    got, headers, content = live.request(path=PATHS[where], body=body)
    error = json.loads(content)["error"]
    assert got == status
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert headers["content-type"] == "application/json"
    assert time.monotonic() - begun < 10
    assert live.worker.live == 0


def test_after_all_that_requests_are_answered(live):
    status, headers, content = live.request()
    assert (status, json.loads(content)["usage"]["completion_tokens"]) == (200, 4)
    assert live.request("GET", "/v1/nothing")[0] == 404
    assert live.request("GET")[0] == 405
    status, _, content = live.request("GET", "/v1/models/gpt-4")
    assert (status, json.loads(content)["error"]["code"]) == (404, "model_not_found")


def test_a_stream_that_is_refused_is_no_stream(live):
    status, headers, content = live.request(body={**CHAT, "stream": True, "temperature": -1})
    assert (status, headers["content-type"]) == (400, "application/json")


def test_request_ids(live):
    assert live.request(x_request_id="mine-7")[1]["x-request-id"] == "mine-7"
    assert live.request(body=b"{", x_request_id="mine-8")[1]["x-request-id"] == "mine-8"
    made = [live.request(**given)[1]["x-request-id"] for given in ({}, {}, {"x_request_id": "a b"})]
    assert len(set(made)) == 3
    assert all(id.startswith("req_") for id in made)


def test_large_bodies_are_not_read(live):
    huge = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    status, _, content = live.request(body=huge)
    assert (status, json.loads(content)["error"]["code"]) == (413, "request_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", live.port)  # and where no length is said beforehand
    connection.request(
        "POST", PATHS["chat"], iter([b"x" * 2**20] * 5), {"transfer-encoding": "chunked"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()
    most = 16 * 1024 + 2**16  # as the context has 1024 tokens
    assert live.request(body=b" " * most)[0] == 400
    assert live.request(body=b" " * (most + 1))[0] == 413
    assert live.request()[0] == 200


def test_answers_are_counted_before_they_are_prepared(live, monkeypatch):
    """10^30 of them would fill memory; so many are not tried here, lest a mistake fills this machine's."""
    made = []
    monkeypatch.setattr("jaxllm.serving.chat.splitter_for", lambda *given: made.append(given))
    monkeypatch.setattr("jaxllm.serving.completions.Unsplit", lambda: made.append(None))
    for path, body in ((PATHS["chat"], CHAT), (PATHS["text"], {"model": "tiny", "prompt": ["x"] * 100})):
        status, _, content = live.request(path=path, body=body | {"n": 1000})
        assert (status, made) == (400, []) and b"answers to one request: there is room for 8" in content


def test_a_body_that_does_not_come(live, monkeypatch):
    monkeypatch.setattr("jaxllm.serving.app.PATIENCE", 0.2)
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        assert b" 408 " in raw.recv(1000)


# Who may come in.


def test_a_key(model):
    with serving(model, key="sesame") as live:
        for given in ("", "Bearer", "Bearer open", "Basic sesame", "Bearer sésame".encode()):
            status, _, content = live.request(authorization=given)
            assert (status, json.loads(content)["error"]["code"]) == (401, "invalid_api_key")
        assert live.request("GET", "/metrics")[0] == 401
        assert [live.request("GET", path)[0] for path in ("/", "/health")] == [200, 200]
        assert live.request(authorization="Bearer sesame")[0] == 200
        assert live.request(authorization="bearer sesame", host="example.com")[0] == 200
        with live.client as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_without_a_key_only_this_machine_and_no_page_of_another(live):
    assert live.request(host="example.com")[0] == 403  # a name that was made to point here
    assert live.request(origin="http://example.com")[0] == 403
    assert live.request(origin="null")[0] == 403
    assert live.request(host=f"localhost:{live.port}", origin=f"http://localhost:{live.port}")[0] == 200
    assert live.request(host=f"[::1]:{live.port}")[0] == 200


COMMANDS = {
    "open to all": (["--host", "0.0.0.0"], "lets other machines in: give --api-key KEY, or set JAXLLM_API_KEY"),
    "no port": (["--port", "70000"], "--port 70000: must be 0 to 65535"),
    "no slots": (["--slots", "0"], "--slots"),
    "no time": (["--timeout", "0"], "--timeout"),
    "a key of other letters": (["--api-key", "sésame"], "use ASCII"),
    "no such host": (["--host", "no.such.host", "--api-key", "k"], "--host no.such.host"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_that_are_refused(name, capsys):
    options, message = COMMANDS[name]
    assert main(["serve", "--model", "demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(live, capsys):
    assert main(["serve", "--model", "demo", "--port", str(live.port)]) == 2
    assert f"--host 127.0.0.1 --port {live.port}: Address already in use" in capsys.readouterr().err


# Load, and clients that do not behave.


@pytest.fixture(scope="module")
def slow(model):
    with serving(model, Slow) as live:
        yield live


def test_no_room(slow):
    waiting = [slow.open(max_tokens=400) for _ in range(SLOTS + QUEUE)]
    slow.wait(lambda worker: worker.live == SLOTS + QUEUE)
    status, headers, content = slow.request()
    assert (status, headers["retry-after"], json.loads(content)["error"]["type"]) == (429, "1", "rate_limit_error")
    for raw in waiting:
        raw.close()
    slow.wait(lambda worker: worker.live == 0)
    assert slow.request()[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(slow, stream):
    raw = slow.open(max_tokens=900, stream=stream)
    slow.wait(lambda worker: worker.engine.running == 1)
    raw.close()
    slow.wait(lambda worker: worker.live == 0 and not worker.engine.busy)  # 900 tokens would take 45 s


def test_openai_s_client_closes_a_stream(slow):
    with slow.client as client:
        stream = client.chat.completions.create(**CHAT | {"max_tokens": 900}, stream=True)
        next(stream), next(stream)
        stream.close()
    slow.wait(lambda worker: worker.live == 0 and not worker.engine.busy)


def test_a_client_that_does_not_read(live, monkeypatch, caplog):
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    caplog.set_level("INFO")
    readers = [live.open(max_tokens=300, stream=True, logprobs=True, top_logprobs=20) for _ in range(SLOTS)]
    assert live.request()[0] == 200
    live.wait(lambda worker: worker.live == 0 and not worker.engine.busy)
    assert caplog.text.count("the client has gone") == SLOTS  # 300 times 21 probabilities fill the buffers
    for raw in readers:
        raw.close()


def test_time_that_is_up(model):
    with serving(model, Slow, timeout=0.4) as live, live.client as client:
        answer = client.chat.completions.create(**CHAT | {"max_tokens": 900})
        assert answer.choices[0].finish_reason == "length"
        assert 1 <= answer.usage.completion_tokens < 20
    with serving(model, Stuck, timeout=0.1) as live:
        status, headers, content = live.request()
        assert (status, headers["retry-after"], json.loads(content)["error"]["code"]) == (503, "1", "timeout")


def test_a_step_that_fails(model, caplog):
    with serving(model, Breaking) as live, live.client as client:
        assert live.request()[0] == 200
        Breaking.fails = True
        status, _, content = live.request()
        assert (status, json.loads(content)["error"]["code"]) == (500, "internal_error")
        assert "memory" not in content.decode()  # that is in the log
        assert "out of memory" in caplog.text
        assert live.request()[0] == 200
        stream = client.chat.completions.create(**CHAT | {"max_tokens": 900}, stream=True)
        next(stream), next(stream)
        Breaking.fails = True
        with pytest.raises(openai.APIError, match="the server failed"):
            list(stream)
        assert live.request()[0] == 200
        assert live.request("GET", "/health")[0] == 200


def test_a_step_that_fails_spares_those_who_wait(model, caplog):
    with serving(model, Breaking) as live:
        running = [live.open(max_tokens=900) for _ in range(SLOTS)]
        live.wait(lambda worker: worker.engine.running == SLOTS)
        waiting = live.open()
        live.wait(lambda worker: worker.engine.waiting == 1)
        Breaking.fails = True
        for raw, status in [*((raw, b" 500 ") for raw in running), (waiting, b" 200 ")]:
            assert status in raw.recv(100)
            raw.close()


def test_a_signal_lets_answers_end(tmp_path):
    """A process, as users have it: it answers, and what runs at the end is answered."""
    command = "-m", "jaxllm.serve", "--model", write_chat(tmp_path / "tiny.gguf"), "--dtype", "float32", "--port", "0"
    with start(*command) as process:
        line = process.stderr.readline()
        assert line.startswith("serving tiny.gguf at http://127.0.0.1:")
        fields = CHAT | {"model": "tiny.gguf", "max_tokens": 200, "stream": True, "logit_bias": {EOS: -100}}
        with openai.OpenAI(base_url=line.split()[-1] + "/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(**fields)
            next(stream), next(stream)
            process.send_signal(signal.SIGTERM)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert (process.wait(timeout=60), process.communicate()) == (0, ("", ""))
