"""What the requests of all slots want, on the device: changed when one begins, and for guided ones at every token."""

import jax
import numpy as np

from jaxllm.drawing import MOST_BIASES, Asked, Drawn, Progress, seed_words
from jaxllm.engine.answer import Request
from jaxllm.layers.cache import KVCache
from jaxllm.programs import Batch, Programs
from jaxllm.sampling import OFF, PENALTIES, Sampler


class Requests:
    """The rows of `Asked` and of `Progress`, one for each of `count` slots."""

    def __init__(self, programs: Programs, count: int) -> None:
        vocab, self._programs = programs.vocab_size, programs
        # On the host, by the names of Asked's fields; and what has been sent to the devices since it changed.
        self._asked = {
            "sampler": np.tile(np.float32(list(OFF.values())), (count, 1)),
            "seeds": np.zeros((count, 3), np.uint32),
            "allowed": np.zeros((count, -(-vocab // 32)), np.uint32),
            "constrained": np.zeros(count, bool),
            "biased": np.full((count, MOST_BIASES), vocab, np.int32),
            "biases": np.zeros((count, MOST_BIASES), np.float32),
            "reports": np.zeros(count, bool),
        }
        self._sent: dict[str, jax.Array] = {}
        number, flag = np.zeros(count, np.int32), np.zeros((count, vocab), bool)
        self._progress: Progress = jax.tree.map(
            programs.replicate, Progress(number, number, flag, flag.astype(np.int32))
        )
        self._nothing = programs.replicate(np.zeros(vocab, bool))

    def begin(self, slot: int, request: Request) -> None:
        """A slot's answer is about to begin."""
        values, vocab = request.sampling.values(), self._programs.vocab_size
        self._set("sampler", slot, np.float32(values))
        self._set("seeds", slot, np.array(seed_words(request.seed, request.stream), np.uint32))
        self._set("constrained", slot, np.array(request.guide is not None))
        self._set("reports", slot, np.array(request.logprobs is not None))
        ids, added = np.full(MOST_BIASES, vocab, np.int32), np.zeros(MOST_BIASES, np.float32)
        ids[: len(request.bias)], added[: len(request.bias)] = list(request.bias), list(request.bias.values())
        self._set("biased", slot, ids)
        self._set("biases", slot, added)
        self.allow(slot, request)
        penalized = any(value != OFF[name] for name, value in zip(OFF, values, strict=True) if name in PENALTIES)
        prompted = self._nothing
        if penalized:
            occurs = np.zeros(vocab, bool)
            occurs[request.ids] = True
            prompted = self._programs.replicate(occurs)
        self._progress = self._programs.begin(self._progress, slot, prompted)

    def allow(self, slot: int, request: Request) -> None:
        """Send which tokens may come next, if the request has a guide."""
        if request.guide is not None:
            mask = np.zeros_like(self._asked["allowed"][slot])
            request.guide.mask(mask)
            self._set("allowed", slot, mask)

    def advance(self, cache: KVCache, batch: Batch, window: int, most: int) -> tuple[KVCache, Drawn]:
        """See `Programs.advance`."""
        for name, value in self._asked.items():
            if name not in self._sent:
                self._sent[name] = self._programs.replicate(value.copy())
        asked = Asked(**self._sent | {"sampler": Sampler(self._sent["sampler"])})  # type: ignore[arg-type]
        cache, self._progress, drawn = self._programs.advance(cache, self._progress, asked, batch, window, most)
        return cache, drawn

    def _set(self, name: str, slot: int, value: np.ndarray) -> None:
        if not np.array_equal(self._asked[name][slot], value):
            self._asked[name][slot] = value
            self._sent.pop(name, None)
