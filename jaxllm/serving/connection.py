"""Connections that nobody can hold for long: uvicorn's, with deadlines, and with room for new ones.

uvicorn itself waits for ever for a request's headers, for what remains of a body after its answer, and for a client
that does not take what it was sent; and where connections are many it refuses whoever comes, not who lingers.
"""

import asyncio
import time
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 30.0  # seconds that a client may take to send a body, or to take some of what it is sent
HEADERS = 10.0  # seconds from the start of a connection, or from its last answer, to the end of a request's headers
MOST = 512  # connections; above, those make room that have waited longest for their request to be complete


class Connection(H11Protocol):
    """A client's connection, which is aborted where a client keeps it waiting."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` says when something is not taken at once
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._expect_request()
        if len(self.connections) > MOST:
            waiting = [other for other in self.connections if isinstance(other, Connection) and other._is_incomplete]
            min(waiting, key=lambda other: other._since, default=self).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel("headers")  # there is a request, and its body is the application's business

    def on_response_complete(self) -> None:
        self._expect_request()  # before what a client has sent ahead is looked at
        super().on_response_complete()
        if not self.cycle.response_complete:
            self._cancel("headers")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set("taking", PATIENCE)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("taking")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for name in list(self._timers):
            self._cancel(name)

    @property
    def _is_incomplete(self) -> bool:
        """Whether the client has not sent a whole request since the last one that was answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _expect_request(self) -> None:
        self._since = time.monotonic()
        self._set("headers", HEADERS)

    def _set(self, name: str, seconds: float) -> None:
        self._cancel(name)
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _cancel(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


def server(app: Starlette, grace: int) -> uvicorn.Server:
    """What serves an application. `grace`: seconds for what runs, after a signal."""

    async def ended(scope: Scope, receive: Receive, send: Send) -> None:
        """The application, whose answers that are cut off after that time are no errors with a traceback."""

        async def until_told() -> Message:
            """Also where uvicorn does not say that it ends, which is so after a second Ctrl-C."""
            try:
                return await receive()
            except asyncio.CancelledError:
                return {"type": "lifespan.shutdown"}

        with suppress(asyncio.CancelledError):
            await app(scope, until_told if scope["type"] == "lifespan" else receive, send)

    return uvicorn.Server(
        uvicorn.Config(
            ended,
            http=Connection,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
        )
    )
