"""Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one small latent vector a token.

Two forms of one function. *Naive* makes each head's keys and values from the latents, as ordinary attention does.
*Absorbed* moves those projections to the queries and the outputs, so that attention runs on the latents themselves:
less to read for one new token, more to compute for many. A latent cache serves both, and each phase takes the form
that suits it; a model may also be told to keep every head's keys and values (`per_head_cache`), as the demo's "naive".

Some checkpoints have what makes keys and what makes values in one matrix, kv_b. Others have them in two stacks of a
matrix for each head (`split_kv_b`), of which k_b is `[rank, nope]`, so that its blocks run along what the absorbed form
sums over.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.formats.base import Weight
from jaxllm.layers.attention import dot_product_attention
from jaxllm.layers.cache import write
from jaxllm.layers.heads import HeadLayout
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.parameter import declare
from jaxllm.layers.rope import rotate
from jaxllm.parallel import CACHE, COLUMN, HEAD_STACK, HEADS, REPLICATED, ROW, local, local_specs

Up = tuple[jax.Array, jax.Array]  # what makes keys of latents, [heads, nope, rank], and values, [heads, value, rank]

LATENT_EPS = 1e-6  # of the norms of queries' and keys' latents: DeepSeek's code has it so, whatever rms_norm_eps is


class LatentAttention(nnx.Module):
    """Causal attention over latents; heads are cut over tp, latents are whole on every device.

    Args:
        q_lora_rank: rank of the queries' projection, or None where it is one matrix.
        kv_lora_rank: size of a latent.
        nope, rope, value: sizes of a head's part without and with rotary positions, and of its values.
        scale: of the scores.
        heads: where the heads stand on the mesh.
        per_head_cache, split_kv_b: see above.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        nope: int,
        rope: int,
        value: int,
        scale: float,
        heads: HeadLayout,
        *,
        bias: bool = False,
        per_head_cache: bool = False,
        split_kv_b: bool = False,
    ) -> None:
        self.rank, self.nope, self.rope, self.value = kv_lora_rank, nope, rope, value
        self.scale, self.per_head_cache, self.split_kv_b = scale, per_head_cache, split_kv_b
        self.cache_shape = (len(heads.query), nope + rope, value) if per_head_cache else (1, kv_lora_rank, rope)
        q_shape, q_rows = num_heads * (nope + rope), heads.rows(heads.query, nope + rope)
        low = q_lora_rank is not None
        self.q_proj = None if low else Linear((q_shape, hidden_size), COLUMN, rows=q_rows)
        self.q_a_proj = Linear((q_lora_rank, hidden_size), REPLICATED, bias=bias) if low else None
        self.q_a_layernorm = RMSNorm(q_lora_rank, LATENT_EPS) if low else None
        self.q_b_proj = Linear((q_shape, q_lora_rank), COLUMN, rows=q_rows) if low else None
        self.kv_a_proj_with_mqa = Linear((kv_lora_rank + rope, hidden_size), REPLICATED, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, LATENT_EPS)
        if split_kv_b:
            self.k_b_proj = declare((num_heads, kv_lora_rank, nope), HEAD_STACK, stack=heads.query)
            self.v_b_proj = declare((num_heads, value, kv_lora_rank), HEAD_STACK, stack=heads.query)
        else:
            kv_rows = heads.rows(heads.query, nope + value)
            self.kv_b_proj = Linear((num_heads * (nope + value), kv_lora_rank), COLUMN, rows=kv_rows)
        o_cols = heads.rows(heads.query, value)
        self.o_proj = Linear((hidden_size, num_heads * value), ROW, cols=o_cols, bias=bias)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        window: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `Attention`. The cache is latents and rotary keys, `[batch, 1, capacity, kv_lora_rank or rope]`, or, with
        `per_head_cache`, keys and values `[batch, heads, capacity, nope + rope or value]`."""
        q = self.q_proj(x) if self.q_proj else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], -1, self.nope + self.rope) * self.scale
        q_nope, q_rope = q[..., : self.nope], rotate(q[..., self.nope :], *rope)
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), (self.rank,), axis=-1)
        latent, k_rope = self.kv_a_layernorm(latent)[:, :, None], rotate(k_rope[:, :, None], *rope)

        form = self._per_head if self.per_head_cache else self._latent
        spec = CACHE if self.per_head_cache else PartitionSpec()
        params = (self.k_b_proj, self.v_b_proj) if self.split_kv_b else (self.kv_b_proj.weight,)
        kv_b, cut = [param.get_value() for param in params], HEAD_STACK if self.split_kv_b else COLUMN

        def attend(
            q_nope: jax.Array,
            q_rope: jax.Array,
            latent: jax.Array,
            k_rope: jax.Array,
            kv_b: list[Weight],
            *rest: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            return form(q_nope, q_rope, latent, k_rope, self._up(kv_b, x.dtype), *rest, window)

        whole = PartitionSpec()
        specs = HEADS, HEADS, whole, whole, [local_specs(w, cut) for w in kv_b], spec, spec, whole
        y, *cache = local(attend, specs, (HEADS, spec, spec))(q_nope, q_rope, latent, k_rope, kv_b, *cache, positions)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), tuple(cache)

    def _up(self, kv_b: list[Weight], dtype: jax.typing.DTypeLike) -> Up:
        if self.split_kv_b:
            k_b, v_b = (w.dequantize(dtype) for w in kv_b)
            return k_b.swapaxes(1, 2), v_b
        both = kv_b[0].dequantize(dtype).reshape(-1, self.nope + self.value, self.rank)
        return both[:, : self.nope], both[:, self.nope :]

    def _per_head(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        up: Up,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        window: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        k, v = self._expand(latent[:, :, 0], k_rope[:, :, 0], up)
        keys, values = _written((keys, k.swapaxes(1, 2)), (values, v.swapaxes(1, 2)), positions)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        return dot_product_attention(q, keys[:, :, :window], values[:, :, :window], positions, None), keys, values

    def _latent(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        up: Up,
        latents: jax.Array,
        ropes: jax.Array,
        positions: jax.Array,
        window: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        latents, ropes = _written((latents, latent), (ropes, k_rope), positions)
        seen, seen_rope = latents[:, :, :window].astype(latent.dtype), ropes[:, :, :window].astype(latent.dtype)
        if positions.shape[1] > 1:
            keys, values = self._expand(seen[:, 0], seen_rope[:, 0], up)
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            return dot_product_attention(q, keys, values, positions, None), latents, ropes
        # The latents are the one key and the one value head that all queries share.
        q = jnp.concatenate([_einsum("bthn,hnr->bthr", q_nope, up[0]), q_rope], axis=-1)
        y = dot_product_attention(q, jnp.concatenate([seen, seen_rope], axis=-1), seen, positions, None)
        return _einsum("bthr,hvr->bthv", y, up[1]), latents, ropes

    def _expand(self, latents: jax.Array, ropes: jax.Array, up: Up) -> tuple[jax.Array, jax.Array]:
        """Every head's keys `[batch, heads, time, nope + rope]` and values, of latents `[batch, time, rank]`."""
        k_nope = _einsum("bsr,hnr->bhsn", latents, up[0])
        shared = jnp.broadcast_to(ropes[:, None], (*k_nope.shape[:3], ropes.shape[-1]))
        return jnp.concatenate([k_nope, shared], axis=-1), _einsum("bsr,hvr->bhsv", latents, up[1])


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32).astype(a.dtype)


def _written(*pairs: tuple[jax.Array, jax.Array] | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both buffers with what is new, kept from fusing with their readers (see `Attention`)."""
    (a, new_a), (b, new_b), positions = pairs
    return lax.optimization_barrier((write(a, new_a, positions[:, 0]), write(b, new_b, positions[:, 0])))
