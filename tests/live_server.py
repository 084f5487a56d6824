"""A server on a loopback port, in a thread of the test's process, and engines that do not behave."""

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass

import openai
from tiny_chat import TOKENS

from jaxllm.engine.engine import Engine
from jaxllm.serving import connection
from jaxllm.serving.app import application
from jaxllm.serving.worker import Worker

SLOTS, QUEUE = 4, 4
SAY = [{"role": "user", "content": "Say something."}]
CHAT = {"model": "tiny", "messages": SAY, "max_tokens": 4}
EOS = TOKENS.index("<|im_end|>")


@dataclass
class Live:
    """A server that runs."""

    worker: Worker
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def client(self):
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def request(self, method="POST", path="/v1/chat/completions", body=CHAT, **headers):
        """The status, the headers and the body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def open(self, **fields):
        """A socket that has sent a request, but has read nothing."""
        data = json.dumps(CHAT | fields).encode()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", self.port))
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        return raw

    def wait(self, condition):
        for _ in range(6000):
            if condition(self.worker):
                return
            time.sleep(0.01)
        raise AssertionError("it does not come true")


@contextlib.contextmanager
def serving(model, make=Engine, timeout=60, key=None):
    worker = Worker(make(model, SLOTS), SLOTS + QUEUE, timeout)
    app = application(model, worker, "tiny", key)
    server = connection.server(app, grace=5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that who does not read is noticed soon
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Live(worker, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


class Slow(Engine):
    """20 steps a second, so that there is time to leave."""

    def step(self):
        time.sleep(0.05)
        return super().step()


class Stuck(Engine):
    """Gives nobody anything."""

    def step(self):
        time.sleep(0.01)
        return []


class Breaking(Slow):
    """Fails when told so, as if memory had run out."""

    fails = False

    def _round(self):
        changed = super()._round()
        if Breaking.fails:
            Breaking.fails = False
            raise RuntimeError("out of memory")
        return changed
