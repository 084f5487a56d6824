"""The server as an ASGI application: its routes, and what is behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jaxllm.language_model import LanguageModel
from jaxllm.serving import bodies
from jaxllm.serving.answering import Answering
from jaxllm.serving.answers import Reply, Served
from jaxllm.serving.chat import ChatReply
from jaxllm.serving.completions import TextReply
from jaxllm.serving.connection import PATIENCE
from jaxllm.serving.errors import RequestError
from jaxllm.serving.front import Front
from jaxllm.serving.metrics import Metrics
from jaxllm.serving.page import PAGE, PAGE_HEADERS
from jaxllm.serving.responses import ResponseReply
from jaxllm.serving.worker import Worker


def most_bytes(capacity: int) -> int:
    """How large a body may be, for a context of so many tokens.

    A token is four or five bytes of text, in JSON with escapes about a dozen. More only costs time, and memory: text
    becomes hundreds of bytes a character while it is made into tokens.
    """
    return min(2**22, 2**16 + 16 * capacity)


def application(model: LanguageModel, worker: Worker, name: str, key: str | None = None) -> Starlette:
    """The application, which starts and stops the worker.

    Args:
        model: has a tokenizer.
        name: what clients call it.
        key: what clients have to know, or None.
    """
    service = Service(model, worker, name)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    return Starlette(
        routes=service.routes,
        middleware=[Middleware(Front, key=key, count=service.metrics.count)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


class Service:
    """The routes. Arguments are those of `application`."""

    def __init__(self, model: LanguageModel, worker: Worker, name: str) -> None:
        assert model.tokenizer
        capacity = min(model.max_seq_len, worker.engine.capacity)
        self._most_bytes = most_bytes(capacity)
        self._worker, self._served = worker, Served(name, model.tokenizer, capacity, model.sampling)
        self._model = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "jaxllm",
            "max_model_len": capacity,  # vLLM's name for it
            "summary": str(model.summary()),
        }
        self.routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._read_metrics),
            Route("/", self._page),
        ]
        self.metrics = Metrics(worker, [route.path for route in self.routes])

    async def _chat(self, request: Request) -> Answering:
        return await self._answer(request, bodies.Chat, ChatReply)

    async def _completions(self, request: Request) -> Answering:
        return await self._answer(request, bodies.Text, TextReply)

    async def _responses(self, request: Request) -> Answering:
        return await self._answer(request, bodies.Response, ResponseReply)

    async def _answer[B: bodies.Options](
        self, request: Request, kind: type[B], reply: Callable[[Served, B], Reply]
    ) -> Answering:
        self._worker.check_room()  # before anything is read or computed
        body = kind.model_validate_json(await _read(request, self._most_bytes))
        self._check_name(body.model)
        self._worker.check_room(body.answers)
        made = await asyncio.to_thread(reply, self._served, body)  # texts can be long, and schemas large
        return Answering(self._worker, made, bool(body.stream), self.metrics)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]})

    async def _one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model)

    async def _health(self, request: Request) -> Response:
        alive = self._worker.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    async def _read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    def _check_name(self, name: str) -> None:
        if name != self._served.name:
            message = f"there is no model '{name}' here, only '{self._served.name}'"
            raise RequestError(404, message, code="model_not_found", param="model")


async def _read(request: Request, most: int) -> bytes:
    """The body, unless it is too large or too slow."""
    too_large = RequestError(413, f"a request may have {most:,} bytes", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > most:  # h11 has checked that it is a number
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {PATIENCE:.0f} s") from None
    return bytes(body)


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(error.status_code, what).body(), error.status_code, error.headers)
