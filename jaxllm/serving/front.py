"""What every request passes on its way in, and every answer on its way out."""

import hmac
import logging
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serving.answers import new_id
from jaxllm.serving.errors import RequestError, as_request_error

LOG = logging.getLogger("jaxllm.serving")

OPEN = {"/", "/health"}  # what needs no key
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Front:
    """A middleware: request ids, who may come in, and errors in OpenAI's shape.

    Without a key, whoever reaches the server may use it, and on loopback these are also the pages that a browser of
    this machine shows. They can send requests, and they can read the answers too if the name of their host is made to
    point here. So without a key the host has to be loopback, and a page has to come from here.

    Args:
        key: what clients have to know, or None.
        count: is told the path and the status of every answer.
    """

    def __init__(self, app: ASGIApp, key: str | None, count: Callable[[str, int], None]) -> None:
        self._app, self._key, self._count = app, key, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else new_id("req_")
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update({"x-request-id": id, "x-content-type-options": "nosniff"})
                self._count(scope["path"], message["status"])
            await send(message)

        try:
            self._admit(scope["path"], headers)
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            LOG.info("%s: the client has gone", id)
        except Exception as error:
            if begun:
                raise
            await error_response(error, id)(scope, receive, sending)

    def _admit(self, path: str, headers: Headers) -> None:
        if self._key is None:
            host = urlsplit(f"//{headers.get('host', '')}")
            if host.hostname not in LOOPBACK:
                raise RequestError(403, f"this server answers to localhost only, not to '{headers.get('host', '')}'")
            if urlsplit(headers.get("origin", f"//{host.netloc}")).netloc != host.netloc:
                raise RequestError(403, f"pages of {headers['origin']} may not use this server")
        elif path not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode()):
                raise RequestError(
                    401, "no API key, or a wrong one: send 'Authorization: Bearer KEY'", code="invalid_api_key"
                )


def error_response(error: Exception, id: str) -> Response:
    """An error as it is answered. What is our mistake goes to the log."""
    told = as_request_error(error)
    if told.status == 500:
        LOG.error("%s: failed", id, exc_info=error)
    return JSONResponse(told.body(), told.status, told.headers)
