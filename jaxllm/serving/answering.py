"""An answer on its way to a client: at once or as a stream of events, and cancelled if the client goes away."""

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from jaxllm.serving.answers import Reply
from jaxllm.serving.errors import as_request_error
from jaxllm.serving.metrics import Metrics
from jaxllm.serving.worker import Worker

LOG = logging.getLogger("jaxllm.serving")

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would keep events back
}


class Answering:
    """An ASGI response that has the worker answer while it is sent."""

    def __init__(self, worker: Worker, reply: Reply, stream: bool, metrics: Metrics) -> None:
        self._worker, self._reply, self._stream, self._metrics = worker, reply, stream, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_events(send) if self._stream else self._send_whole(scope, receive, send)
        await _while_connected(receive, work)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.timed() as first:
            async with self._worker.answers(self._reply.asks) as events:
                async for new in events:
                    first()
                    for event in new:
                        self._reply.push(event)
        await JSONResponse(self._reply.whole())(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        reply = self._reply
        with self._metrics.timed() as first:
            async with self._worker.answers(reply.asks) as events:
                headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await _send(send, reply.begin())
                try:
                    async for new in events:
                        first()
                        await _send(send, [chunk for event in new for chunk in reply.push(event)])
                    last = reply.finish()
                except ClientDisconnect:
                    raise
                except Exception as error:
                    told = as_request_error(error)
                    if told.status == 500:
                        LOG.exception("a stream failed")
                    last = [reply.failure(told)]
        await send({"type": "http.response.body", "body": _encode(last) + reply.end, "more_body": False})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))


async def _send(send: Send, objects: Iterable[dict[str, Any]]) -> None:
    if data := _encode(objects):
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _encode(objects: Iterable[dict[str, Any]]) -> bytes:
    """Server-sent events, each with a name if the object has a type."""
    return "".join(map(_event, objects)).encode()


def _event(value: dict[str, Any]) -> str:
    data = f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return f"event: {value['type']}\n{data}" if "type" in value else data
