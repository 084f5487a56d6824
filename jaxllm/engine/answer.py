"""An answer that grows token by token: its text, what ends it, and how fast it came."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from jaxllm.drawing import MOST_TOP
from jaxllm.errors import InputError
from jaxllm.sampling import Sampling
from jaxllm.structured import Guide
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer.chat import Messages

Prompt = str | Messages | Sequence[int]


@dataclass(frozen=True)
class TokenLogprob:
    """What the model said of a token, before temperature and penalties.

    Attributes:
        token: its id.
        logprob: its natural log-probability.
        top: the most likely tokens at its place and their log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Completion:
    """An answer.

    Attributes:
        prompt: the prompt as it was given.
        text: the answer, without the token or the text that ended it; empty if there is no tokenizer.
        tokens: the ids of all generated tokens, including the one that ended the answer.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of these the cache held already, so that they were not processed.
        finish_reason: "stop" if the model or a stop text ended the answer, "length" if a limit did, "cancelled" if
            someone did, "error" if it could not go on.
        prefill_tok_s: processed prompt tokens per second, until the first token of the answer.
        decode_tok_s: tokens per second from the second token on. (The first decode step has costs of its own.)
        logprobs: of each token, where they were asked for.

    Rates leave out the time that compiling took. In a batch they are this prompt's own, not the sum.
    """

    prompt: Prompt
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = "length"
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        ids: the prompt.
        limit: the most tokens of the answer.
        seed, stream: of the random draws; answers to one seed differ by their streams.
        eos: tokens that end the answer.
        stop: texts that end it.
        logprobs: how many of the most likely tokens to report beside each token; None: no log-probabilities.
        bias: what is added to the logits of tokens.
        guide: what restricts the answer; None: nothing.
    """

    ids: list[int]
    limit: int
    sampling: Sampling
    seed: int
    stream: int
    eos: Collection[int]
    stop: Sequence[str]
    logprobs: int | None
    bias: Mapping[int, float]
    guide: Guide | None

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InputError(f"max_new_tokens={self.limit}: must be 1 or above")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_TOP:
            raise InputError(f"logprobs={self.logprobs}: must be 0 to {MOST_TOP}")
        if not all(self.stop):
            raise InputError("stop: an empty text would end every answer")


@dataclass(frozen=True)
class Piece:
    """What came to an answer since one last looked.

    Attributes:
        text: the text of `tokens`, but for what is held back because more has to come first.
        tokens: ids.
        logprobs: of these tokens; empty if they were not asked for.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]


class Answer:
    """An answer in the making, as `Engine.add` returns it.

    Attributes:
        completion: all that there is of it so far.
        done: whether it has ended.
        error: why it could not go on; None: nothing went wrong.
    """

    def __init__(self, request: Request, completion: Completion, tokenizer: Tokenizer | None) -> None:
        self.request, self.completion, self.done = request, completion, False
        self.error: InputError | None = None
        self.times: list[float] = []  # when it was begun, and when each of its tokens came
        self._stream = tokenizer.stream() if tokenizer else None
        self._held = ""  # the beginning of what may become a stop text
        self._taken = 0, 0
        completion.prompt_tokens = len(request.ids)
        completion.logprobs = None if request.logprobs is None else []

    @property
    def known(self) -> list[int]:
        """The tokens of prompt and answer."""
        return [*self.request.ids, *self.completion.tokens]

    def take(self) -> Piece:
        """What came since the last call."""
        (text, tokens), c = self._taken, self.completion
        self._taken = len(c.text), len(c.tokens)
        return Piece(c.text[text:], c.tokens[tokens:], (c.logprobs or [])[tokens:])

    def push(self, token: int, now: float, logprob: TokenLogprob | None) -> None:
        """Add the next `token` with its `logprob`, which came at `now`."""
        c, request = self.completion, self.request
        c.tokens.append(token)
        if c.logprobs is not None and logprob is not None:
            c.logprobs.append(logprob)
        self.times.append(now)
        if token in request.eos:
            return self.finish("stop")
        if request.guide is not None:
            request.guide.accept(token)
        if self._stream is not None and self._text(self._stream.push(token)):
            return None
        if request.guide is not None and request.guide.ended:
            return self.finish("stop")
        return self.finish("length") if len(c.tokens) == request.limit else None

    def finish(self, reason: str) -> None:
        """End the answer for a `reason`, see `Completion`: what is still held back belongs to its text."""
        if self._stream is not None and not self._text(self._stream.finish()):
            self.completion.text += self._held
        self._end(self.completion.finish_reason if self.done else reason)

    def fail(self, error: InputError) -> None:
        """End the answer: with this `error` it cannot go on."""
        self.error = error
        self.finish("error")

    def _end(self, reason: str) -> None:
        c = self.completion
        self.done, c.finish_reason = True, reason
        if len(self.times) > 1:
            c.prefill_tok_s, c.decode_tok_s = rates(c.prompt_tokens - c.cached_tokens, self.times)

    def _text(self, new: str) -> bool:
        """Add text, but hold back what may become a stop text. Returns whether one ended the answer."""
        text = self._held + new
        found = [at for stop in self.request.stop if (at := text.find(stop)) >= 0]
        if found:
            self.completion.text += text[: min(found)]
            self._held = ""
            self._end("stop")
            return True
        held = max((_overlap(text, stop) for stop in self.request.stop), default=0)
        self.completion.text += text[: len(text) - held]
        self._held = text[len(text) - held :]
        return False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def rates(processed: int, times: Sequence[float]) -> tuple[float, float]:
    """Tokens per second of prefill and decoding, from when the answer began and when each of its tokens came.

    The first decode step counts only while there is no other.
    """
    begun, first, *later = times
    since = first if len(later) < 2 else later.pop(0)
    prefill = processed / (first - begun) if first > begun else 0.0
    return prefill, len(later) / (times[-1] - since) if later and times[-1] > since else 0.0
