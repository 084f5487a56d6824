"""Connections that are held: each ends after its deadline, and whoever means well is answered meanwhile."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_server import EOS, serving
from tiny_chat import write_chat

from jaxllm.serving import connection

SCRIPT = Path(__file__).parent / "reference" / "serving_attacks.py"


@pytest.fixture(scope="module")
def live(tmp_path_factory, load_once):
    with serving(load_once(write_chat(tmp_path_factory.mktemp("serving") / "tiny.gguf"), dtype="float32")) as live:
        yield live


def connected(live, data=b""):
    raw = socket.create_connection(("127.0.0.1", live.port))
    raw.settimeout(10)
    raw.sendall(data)
    return raw


def ends(raw, sending=b""):
    """Whether the server ends the connection within ten seconds, in which something is sent from time to time."""
    raw.settimeout(0.05)
    for _ in range(200):
        try:
            raw.sendall(sending)
            if raw.recv(1000) == b"":
                return True
        except TimeoutError:
            pass
        except OSError:
            return True
    return False


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Much: ",
        b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["nothing", "half a header", "a body after its answer", "half a second request"],
)
def test_a_byte_from_time_to_time_holds_no_connection(live, monkeypatch, data):
    monkeypatch.setattr(connection, "HEADERS", 0.3)
    begun = time.monotonic()
    with connected(live, data) as raw:
        assert ends(raw, b"x")
    assert time.monotonic() - begun > 0.25


def test_whoever_waits_longest_makes_room(live, monkeypatch):
    monkeypatch.setattr(connection, "MOST", 3)
    monkeypatch.setattr(connection, "HEADERS", 60)  # so that nobody ends for another reason
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    with contextlib.ExitStack() as stack:

        def new(data=b""):
            return stack.enter_context(connected(live, data))

        first, second, third = new(), new(), new()
        slow = new(half)
        assert ends(first)
        assert live.request()[0] == 200
        assert ends(second)
        last = [new() for _ in range(3)]
        assert ends(third) and ends(slow)  # a body that does not come is no better than no header
        last[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in last[-1].recv(100)


def test_an_answer_that_nobody_takes_is_given_up(live, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    fields = {"max_tokens": 300, "logprobs": True, "top_logprobs": 20, "logit_bias": {EOS: -100}}
    with live.open(**fields) as raw:  # not a stream: written at once, and done
        live.wait(lambda worker: worker.live == 1)
        live.wait(lambda worker: worker.live == 0)
        time.sleep(1)
        raw.settimeout(10)
        got = b"".join(iter(lambda: raw.recv(100_000), b""))
    head, _, body = got.partition(b"\r\n\r\n")
    assert b" 200 " in head and len(body) < int(re.search(rb"content-length: (\d+)", head)[1])


def test_all_attacks_at_once(live, monkeypatch):
    """The script of two minutes, for some seconds."""
    for name, value in (("connection.HEADERS", 1.0), ("connection.PATIENCE", 2.0), ("app.PATIENCE", 2.0)):
        monkeypatch.setattr(f"jaxllm.serving.{name}", value)
    options = ["--port", str(live.port), "--pid", str(os.getpid()), "--model", "tiny", "--seconds", "1", "--size", "4"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert live.worker.live == 0 and live.request()[0] == 200
