"""What a call tells all layers about the tokens that they process."""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """The positions of a call's new tokens in their sequences.

    Attributes:
        positions: int32 `[batch, time]`, consecutive in time.
        angles: cosine and sine of the layer's rotary embedding, float32 `[batch, time, 1, rotary_dim / 2]`; None for a
            layer without one.
        counts: int32 `[batch]`, how many of the tokens are real; the rest is padding.
        window: how many positions of the cache are read; all of `positions` are below it.
        int8_blocks: what matmuls may do with activations, see `activations.rounding`.
        per_layer: what the layer is given besides the previous one's output, see `decoder.Ends`; None: nothing.
        segments: int32 `[batch, time]`, for rows that are complete: which of several texts in its row each token
            belongs to, in ascending order. Tokens attend to their own text, and to nothing cached. None: rows that
            continue what is cached.
    """

    positions: jax.Array
    counts: jax.Array
    angles: tuple[jax.Array, jax.Array] | None
    window: int = field(metadata={"static": True})
    int8_blocks: bool = field(metadata={"static": True})
    per_layer: jax.Array | None = None
    segments: jax.Array | None = None
