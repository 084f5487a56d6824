"""The thread that owns the engine, and what passes between it and the event loop.

An engine is not thread-safe and a step of it takes long, so it has a thread of its own. The event loop sends it
commands through a queue; what a step brought goes back in one callback, however many answers took part.
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxllm.engine.answer import Answer, Completion, Piece
from jaxllm.engine.engine import Engine
from jaxllm.serving.errors import RequestError

LOG = logging.getLogger("jaxllm.serving")

RETRY_AFTER = 1  # seconds; there is room again whenever an answer ends


@dataclass(frozen=True)
class Event:
    """Something new of an answer.

    Attributes:
        index: which of the request's answers.
        completion: all of it, once it is done.
    """

    index: int
    piece: Piece
    completion: Completion | None


@dataclass
class Job:
    """The answers to one request.

    Attributes:
        left: how many are not done yet; 0 once nobody waits for them.
    """

    left: int
    news: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)

    async def events(self) -> AsyncIterator[list[Event]]:
        """What is new, until all answers are done. Raises the exception that ended them."""
        missing = self.left
        while missing:
            new = [await self.news.get()]
            while not self.news.empty():
                new.append(self.news.get_nowait())
            if failures := [event for event in new if isinstance(event, Exception)]:
                raise failures[0]
            events = [event for event in new if isinstance(event, Event)]
            for event in events:
                if event.completion and event.completion.finish_reason == "cancelled" and not event.completion.tokens:
                    message = "the time was up before there was a slot for this request; try again later"
                    raise RequestError(503, message, "server_error", "timeout", retry_after=RETRY_AFTER)
                missing -= event.completion is not None
            yield events


class Worker:
    """Answers requests with an engine that runs in a thread.

    Args:
        engine: nobody else may use it.
        most: how many answers may run and wait.
        timeout: seconds after which an answer ends with the tokens that it has.

    Attributes:
        live: how many answers run and wait.
    """

    def __init__(self, engine: Engine, most: int, timeout: float) -> None:
        self.engine, self.most, self.live = engine, most, 0
        self._timeout = timeout
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._running: dict[int, tuple[Job, int, Answer]] = {}  # by the answer's id()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin, for the event loop that calls this."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End, after the step that runs."""
        self._commands.put(partial(setattr, self, "_stopped", True))
        await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def check_room(self, answers: int = 1) -> None:
        """Raises RequestError if there is no room for so many answers."""
        if answers > self.most:
            raise RequestError(400, f"{answers} answers to one request: there is room for {self.most}", param="n")
        if self.live + answers > self.most:
            message = f"{self.live} answers are being made or wait, and there is room for {self.most}; try again later"
            raise RequestError(429, message, "rate_limit_error", "rate_limit_exceeded", retry_after=RETRY_AFTER)

    @asynccontextmanager
    async def answers(self, asks: Sequence[Mapping[str, Any]]) -> AsyncIterator[AsyncIterator[list[Event]]]:
        """The answers to `asks`, the arguments of `Engine.add`. What is not done at the end is cancelled.

        Raises:
            RequestError: there is no room, or the time was up before there was any.
            InputError: an ask that the engine does not accept.
        """
        self.check_room(len(asks))
        job = Job(len(asks))
        self.live += job.left
        timer = self._loop.call_later(self._timeout, self._commands.put, partial(self._cancel, job))
        try:
            await self.call(partial(self._add, job, asks))
            yield job.events()
        finally:
            timer.cancel()
            self.live, job.left = self.live - job.left, 0
            self._commands.put(partial(self._cancel, job))

    async def call[T](self, function: Callable[[], T]) -> T:
        """The result of `function`, called in the engine's thread."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    # The engine's thread.

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._obey()
                if self.engine.busy:
                    self._report(self.engine.step())
            except Exception as error:
                LOG.exception("a step of the engine failed")
                self._give_up(error)

    def _obey(self) -> None:
        """Do what was commanded; wait for a command if there is nothing else to do."""
        if not self.engine.busy:
            self._commands.get()()
        with suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _give_up(self, error: Exception) -> None:
        """End the answers that a failure took with it: those that ran or, if none did, also those that wait."""
        entries = list(self._running.values())
        lost = [entry for entry in entries if entry[2].done] or entries
        for _, _, answer in lost:
            self.engine.cancel(answer)
            del self._running[id(answer)]
        self._post([(job, error) for job, _, _ in lost])

    def _add(self, job: Job, asks: Sequence[Mapping[str, Any]]) -> None:
        try:
            for index, ask in enumerate(asks):
                answer = self.engine.add(**ask)
                self._running[id(answer)] = job, index, answer
        except Exception:
            self._cancel(job)
            raise

    def _cancel(self, job: Job) -> None:
        answers = [answer for other, _, answer in self._running.values() if other is job]
        for answer in answers:
            self.engine.cancel(answer)
        self._report(answers)

    def _report(self, answers: Sequence[Answer]) -> None:
        news: list[tuple[Job, Event | Exception]] = []
        for answer in answers:
            if entry := self._running.get(id(answer)):
                job, index, _ = entry
                news.append((job, Event(index, answer.take(), answer.completion if answer.done else None)))
                if answer.done:
                    del self._running[id(answer)]
        if news:
            self._post(news)

    def _post(self, news: list[tuple[Job, Event | Exception]]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
            self._loop.call_soon_threadsafe(self._deliver, news)

    # The event loop's thread.

    def _deliver(self, news: list[tuple[Job, Event | Exception]]) -> None:
        for job, event in news:
            if isinstance(event, Event) and event.completion and job.left:
                self.live, job.left = self.live - 1, job.left - 1
            job.news.put_nowait(event)
