"""What all layers of a call are told about the tokens that they process."""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Where the new tokens of a call stand in their sequences.

    Attributes:
        positions: int32 `[batch, time]`, consecutive in time.
        angles: cosine and sine of the layer's rotary positions, float32 `[batch, time, 1, rotary_dim / 2]`; None for a
            layer without them.
        counts: int32 `[batch]`, how many of the tokens are real; the rest is padding.
        window: how many positions of the cache are looked at; all of `positions` lie below it.
    """

    positions: jax.Array
    counts: jax.Array
    angles: tuple[jax.Array, jax.Array] | None
    window: int = field(metadata={"static": True})
