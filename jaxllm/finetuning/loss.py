"""The loss on answers, and its gradient, without logits for all tokens at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 512  # tokens whose logits exist at a time


def answer_loss(
    logits_of: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropies of all tokens that have a target, and its gradient by `hidden`.

    Tokens with a target come first, so that the head is not applied to prompts and padding. The gradient is computed at
    once, because the loss is the end of the computation: nothing is kept for a backward pass, and nothing is computed
    twice.

    Args:
        logits_of: from hidden states `[tokens, hidden]` to logits, float32 `[tokens, vocab]`.
        hidden: `[batch, time, hidden]`.
        targets: int32 `[batch, time]`, the token that has to follow; negative where any may.

    Returns:
        float32 `[]`, and `[batch, time, hidden]` in the dtype of `hidden`.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = len(flat)
    size = min(CHUNK, count)
    order = jnp.argsort(wanted < 0, stable=True)
    padding = -count % size
    rows = jnp.pad(flat[order], ((0, padding), (0, 0))).reshape(-1, size, flat.shape[1])
    tokens = jnp.pad(wanted[order], (0, padding), constant_values=-1).reshape(-1, size)

    def loss(rows: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = logits_of(rows)
        of_target = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(tokens >= 0, jax.nn.logsumexp(logits, axis=-1) - of_target, 0.0))

    def nothing(rows: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.float32), jnp.zeros_like(rows)

    def chunk(total: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, gradient = lax.cond(given[1][0] >= 0, jax.value_and_grad(loss), nothing, *given)
        return total + value, gradient

    total, gradients = lax.scan(chunk, jnp.zeros((), jnp.float32), (rows, tokens))
    return total, jnp.zeros_like(flat).at[order].set(gradients.reshape(-1, flat.shape[1])[:count]).reshape(hidden.shape)
