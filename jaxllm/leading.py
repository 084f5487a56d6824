"""A model that several processes run: process 0 hands prompts on, and all compute the same answers."""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxllm.engine.answer import Completion, Prompt
from jaxllm.engine.drafting import Drafter
from jaxllm.engine.memory import Memory
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from jaxllm.meeting import Group
from jaxllm.sampling import Sampling


class Leader:
    """Answers prompts in process 0, with all processes of a group. `end` lets the others go.

    What is handed on are token ids and the arguments of the calls, so that every process starts the same computations
    in the same order, which collectives need.

    Args:
        options: of `LanguageModel.generate`, the same for all prompts; as JSON can hold them.
        drafter: guesses tokens; every process has its own.
    """

    def __init__(
        self,
        model: LanguageModel,
        group: Group,
        sampling: Sampling,
        options: Mapping[str, Any],
        drafter: Drafter | None = None,
    ) -> None:
        self.model, self._group, self._sampling, self._options = model, group, sampling, dict(options)
        self._drafter = drafter

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """See `LanguageModel.generate`."""
        self._tell("generate", [self.model.encode(prompt) for prompt in prompts])
        completions = self.model.generate(prompts, sampling=self._sampling, drafter=self._drafter, **self._options)
        assert isinstance(completions, list)
        return completions

    def stream(self, prompt: Prompt, memory: Memory | None, completion: Completion) -> Iterator[str]:
        """See `LanguageModel.stream`. An interruption (Ctrl-C) ends all processes' answers at the same token."""
        self._tell("stream", self.model.encode(prompt), remembers=memory is not None)
        own: dict[str, Any] = {"memory": memory, "completion": completion, "drafter": self._drafter}
        parts = self.model.stream(prompt, sampling=self._sampling, **own, **self._options)
        if self._group.count == 1:
            yield from parts
            return
        with _interruptions() as interrupted:
            for text in parts:
                yield text
                stop = interrupted()
                self._group.tell({"goes_on": not stop})
                if stop:
                    raise KeyboardInterrupt

    def end(self) -> None:
        self._group.tell({"call": "end"})

    def _tell(self, call: str, prompt: list, **more: bool) -> None:
        sampling = dataclasses.asdict(self._sampling)
        self._group.tell({"call": call, "prompt": prompt, "sampling": sampling, "options": self._options, **more})


def follow(model: LanguageModel, group: Group, drafter: Drafter | None = None) -> None:
    """Compute what process 0 asks for, until it has ended."""
    memory = Memory()
    while (asked := group.told())["call"] != "end":
        options: dict[str, Any] = {**asked["options"], "sampling": Sampling(**asked["sampling"]), "drafter": drafter}
        try:
            if asked["call"] == "generate":
                model.generate(asked["prompt"], **options)
                continue
            for _ in model.stream(asked["prompt"], memory=memory if asked["remembers"] else None, **options):
                if not group.told()["goes_on"]:
                    break
        except InputError:
            pass  # process 0 has the same, and says so


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is only noted; a second one takes effect. Yields a function that tells whether there was one."""
    noted = threading.Event()

    def note(number: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
