"""A conversation's cache, kept from one turn to the next."""

from dataclasses import dataclass

from jaxllm.engine.drafting import Drafter
from jaxllm.engine.engine import Engine, Model


@dataclass
class Memory:
    """Keeps what was computed for a conversation, so that only new turns have to be processed.

    Attributes:
        engine: holds the cache; None before the first turn.
        reused: how many tokens of the latest prompt were found in the cache.
    """

    engine: Engine | None = None
    reused: int = 0

    def engine_for(self, model: Model, positions: int, drafter: Drafter | None = None) -> Engine:
        """An engine with room for prompt and answer: the one of the turn before, if that has as much."""
        if self.engine is None or self.engine.model is not model or self.engine.capacity < positions:
            self.engine = Engine(model, 1, positions, drafter)
        elif self.engine.drafter is not drafter:
            self.engine.drafter = drafter
        return self.engine
