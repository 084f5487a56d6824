"""Multi-head latent attention (DeepSeek-V2): the keys and values of all heads come from one small latent per token.

The same function has two forms. *Naive* computes each head's keys and values from the latents and attends as usual.
*Absorbed* moves those projections to the queries and the outputs, so that attention runs on the latents themselves:
it reads less for one new token and computes more for many. A latent cache serves both, so each phase uses the form that
suits it. A model can also cache every head's keys and values (`per_head_cache`), as the demo's "naive" does.

Some checkpoints store the projections to keys and to values in one matrix, kv_b. Others store two stacks with a matrix
per head (`split_kv_b`). There k_b is `[rank, nope]`, so that its blocks run along the dimension that the absorbed form
sums over.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm import tracking
from jaxllm.formats.base import Weight
from jaxllm.kernels.attention import Cached, Scoring, apart
from jaxllm.kernels.coded import Buffer, read
from jaxllm.kernels.dispatch import attention, dequantize
from jaxllm.layers.cache import CacheShape, LayerCache, write
from jaxllm.layers.context import Context
from jaxllm.layers.heads import HeadLayout
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.parameter import declare
from jaxllm.layers.rope import rotate
from jaxllm.parallel import CACHE, COLUMN, HEAD_STACK, HEADS, REPLICATED, ROW, ROWS, local, local_specs, of_batch

Up = tuple[jax.Array, jax.Array]  # latents to keys [heads, nope, rank] and to values [heads, value, rank]
Attended = tuple[jax.Array, Buffer, Buffer]  # the output, and the two updated buffers of the cache

LATENT_EPS = 1e-6  # for the norms of the latents: fixed in DeepSeek's code, whatever rms_norm_eps is


@dataclass(frozen=True)
class LatentSizes:
    """Sizes as in the checkpoint.

    q_rank: rank of the query projection; None if it is a single matrix.
    rank: size of a latent.
    nope, rope, value: sizes of a head's parts without and with rotary positions, and of its values.
    """

    hidden: int
    heads: int
    q_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int


Operand = Any  # an array or a pytree of arrays; or their PartitionSpecs


class _Operands(NamedTuple):
    """The inputs of attention on one device: its heads' queries, what all heads share, and the cache."""

    q_nope: Operand
    q_rope: Operand
    latent: Operand
    k_rope: Operand
    kv_b: Operand
    cache: Operand
    positions: Operand
    rows: Operand
    segments: Operand


class LatentAttention(nnx.Module):
    """Causal attention over latents; heads are sharded over tp, latents are replicated.

    Args:
        scale: what scores are multiplied by.
        heads: how the heads are placed on the mesh.
        per_head_cache, split_kv_b: see the module's docstring.
    """

    def __init__(
        self,
        sizes: LatentSizes,
        scale: float,
        heads: HeadLayout,
        *,
        bias: bool = False,
        per_head_cache: bool = False,
        split_kv_b: bool = False,
    ) -> None:
        s = self.sizes = sizes
        self.scale, self.per_head_cache, self.split_kv_b = scale, per_head_cache, split_kv_b
        per_head = CacheShape(len(heads.query), s.nope + s.rope, s.value)
        self.cache_shape = per_head if per_head_cache else CacheShape(1, s.rank, s.rope, latent=True)
        q_shape, q_rows = s.heads * (s.nope + s.rope), heads.rows(heads.query, s.nope + s.rope)
        low = s.q_rank
        self.q_proj = Linear((q_shape, s.hidden), COLUMN, rows=q_rows) if low is None else None
        self.q_a_proj = None if low is None else Linear((low, s.hidden), REPLICATED, bias=bias)
        self.q_a_layernorm = None if low is None else RMSNorm(low, LATENT_EPS)
        self.q_b_proj = None if low is None else Linear((q_shape, low), COLUMN, rows=q_rows)
        self.kv_a_proj_with_mqa = Linear((s.rank + s.rope, s.hidden), REPLICATED, bias=bias)
        self.kv_a_layernorm = RMSNorm(s.rank, LATENT_EPS)
        if split_kv_b:
            self.k_b_proj = declare((s.heads, s.rank, s.nope), HEAD_STACK, stack=heads.query)
            self.v_b_proj = declare((s.heads, s.value, s.rank), HEAD_STACK, stack=heads.query)
        else:
            kv_rows = heads.rows(heads.query, s.nope + s.value)
            self.kv_b_proj = Linear((s.heads * (s.nope + s.value), s.rank), COLUMN, rows=kv_rows)
        o_cols = heads.rows(heads.query, s.value)
        self.o_proj = Linear((s.hidden, s.heads * s.value), ROW, cols=o_cols, bias=bias)

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        """See `Attention`. The cache holds latents and rotary keys, `[batch, 1, capacity, rank or rope]`. With
        `per_head_cache`, it holds keys and values, `[batch, heads, capacity, nope + rope or value]`."""
        s, angles = self.sizes, context.angles
        assert angles is not None  # all heads have a rotary part
        q = self._queries(x).reshape(*x.shape[:2], -1, s.nope + s.rope) * self.scale
        q_nope, q_rope = q[..., : s.nope], rotate(q[..., s.nope :], *angles)
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), (s.rank,), axis=-1)
        latent, k_rope = self.kv_a_layernorm(latent)[:, :, None], rotate(k_rope[:, :, None], *angles)

        params = (self.k_b_proj, self.v_b_proj) if self.split_kv_b else (self.kv_b_proj.weight,)
        if not self.split_kv_b:
            tracking.record(self.kv_b_proj.weight, latent)
        kv_b, cut = [param.get_value() for param in params], HEAD_STACK if self.split_kv_b else COLUMN
        heads, rows = of_batch(HEADS, len(x)), of_batch(ROWS, len(x))
        spec = of_batch(CACHE, len(x)) if self.per_head_cache else rows
        kv_specs = [local_specs(w, cut) for w in kv_b]
        specs = _Operands(heads, heads, rows, rows, kv_specs, (spec, spec), rows, rows, rows)
        attend = partial(self._per_head if self.per_head_cache else self._latent, window=context.window)
        at = context.positions, context.rows, context.segments
        operands = _Operands(q_nope, q_rope, latent, k_rope, kv_b, cache, *at)
        y, first, second = local(attend, (specs,), (heads, spec, spec))(operands)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), (first, second)

    def _queries(self, x: jax.Array) -> jax.Array:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _up(self, kv_b: list[Weight], dtype: jax.typing.DTypeLike) -> Up:
        if self.split_kv_b:
            k_b, v_b = (dequantize(w, dtype) for w in kv_b)
            return k_b.swapaxes(1, 2), v_b
        both = dequantize(kv_b[0], dtype).reshape(-1, self.sizes.nope + self.sizes.value, self.sizes.rank)
        return both[:, : self.sizes.nope], both[:, self.sizes.nope :]

    def _per_head(self, given: _Operands, window: int) -> Attended:
        if given.segments is not None:
            return self._whole(given)
        k, v = self._expand(given.latent[:, :, 0], self._up(given.kv_b, given.latent.dtype))
        rope = jnp.broadcast_to(given.k_rope.swapaxes(1, 2), (*k.shape[:3], self.sizes.rope))
        k = jnp.concatenate([k, rope], axis=-1)
        keys, values = _written(given, (k.swapaxes(1, 2), v.swapaxes(1, 2)))
        q = jnp.concatenate([given.q_nope, given.q_rope], axis=-1)
        return attention(Cached(q, keys, values, given.positions, rows=given.rows), Scoring(window)), keys, values

    def _latent(self, given: _Operands, window: int) -> Attended:
        if given.segments is not None:
            return self._whole(given)
        dtype, positions = given.latent.dtype, given.positions
        up = self._up(given.kv_b, dtype)
        latents, ropes = _written(given, (given.latent, given.k_rope))
        if positions.shape[1] == 1:
            # The latents serve as the single key head and the single value head, which all queries share.
            q = jnp.concatenate([_einsum("bthn,hnr->bthr", given.q_nope, up[0]), given.q_rope], axis=-1)
            cached = Cached(q, latents, None, positions, rows=given.rows, rope=ropes)
            return _einsum("bthr,hvr->bthv", attention(cached, Scoring(window)), up[1]), latents, ropes
        at = slice(None) if given.rows is None else given.rows
        parts = jax.tree.map(lambda leaf: leaf[at, :, :window], (latents, ropes))
        seen, seen_rope = (read(part, dtype) for part in parts)
        q = jnp.concatenate([given.q_nope, given.q_rope], axis=-1)
        keys, values = self._expand(seen[:, 0], up)
        return attention(Cached(q, keys, values, positions, rope=seen_rope), Scoring(window)), latents, ropes

    def _whole(self, given: _Operands) -> Attended:
        """Rows that are complete, so that nothing is cached. A backward pass dequantizes kv_b again."""

        @jax.checkpoint
        def expand(latents: jax.Array, kv_b: list[Weight]) -> tuple[jax.Array, jax.Array]:
            return self._expand(latents, self._up(kv_b, latents.dtype))

        keys, values = expand(given.latent[:, :, 0], given.kv_b)
        q, at = jnp.concatenate([given.q_nope, given.q_rope], axis=-1), apart(given.positions, given.segments)
        cached = Cached(q, keys, values, at, at, rope=given.k_rope.swapaxes(1, 2))
        y = attention(cached, Scoring(q.shape[1], q.shape[1]))
        return y, *given.cache

    def _expand(self, latents: jax.Array, up: Up) -> tuple[jax.Array, jax.Array]:
        """Every head's keys without the rotary part that all heads share, `[batch, heads, time, nope]`, and its values,
        from latents `[batch, time, rank]`."""
        return _einsum("bsr,hnr->bhsn", latents, up[0]), _einsum("bsr,hvr->bhsv", latents, up[1])


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32).astype(a.dtype)


def _written(given: _Operands, new: tuple[jax.Array, jax.Array]) -> LayerCache:
    """Both buffers updated; a barrier keeps XLA from fusing the updates into their readers (see `Attention`)."""
    start, both = given.positions[:, 0], zip(given.cache, new, strict=True)
    return lax.optimization_barrier(tuple(write(old, x, start, given.rows) for old, x in both))
