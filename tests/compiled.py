"""The compiled programs of a model, as tests look for them; one that decodes weights; and how tests have processes
compile quickly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats.dense import Dense

# What conftest.py does in the process of the tests: no optimizations, and XLA's older emitters, all in one module.
EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": f"{EMITTERS} --xla_cpu_parallel_codegen_split_count=1",
}


@partial(jax.jit, static_argnums=1)
def _decoded(weight, dtype):
    return weight.dequantize(dtype)


def dequantized(weight, dtype=jnp.float32):
    """A weight's matrix, in numpy: one program is compiled sooner than each operation of its decoder."""
    if isinstance(weight, Dense):
        return np.asarray(weight.values).astype(dtype)
    return np.asarray(_decoded(weight, dtype))


def decode_steps(model):
    """The programs that draw one next token for each of their rows."""
    return [program for key, program in model.programs.compiled.items() if key[0] == "advance" and key[1][1] == 1]


def step_by_step(model, tokens):
    """The logits after each of `tokens[batch, time]`, which the model is given one at a time. One program does that; to
    generate takes three."""
    cache, logits = model.programs.empty_cache(len(tokens), 32), []
    for t in range(tokens.shape[1]):
        hidden, cache = model.programs.extend(cache, tokens[:, t : t + 1], np.ones(len(tokens), np.int32), 32)
        logits.append(np.asarray(model.programs.head(hidden)))
    return np.concatenate(logits, 1)


def watch(monkeypatch, model, before=lambda batch: None, after=lambda batch: None):
    """Call `before` and `after` with the batch of each call that adds tokens to sequences."""
    advance = model.programs.advance

    def watched(cache, newest, batch, window, most):
        before(batch)
        result = advance(cache, newest, batch, window, most)
        after(batch)
        return result

    monkeypatch.setattr(model.programs, "advance", watched)


def is_step(batch):
    return batch.tokens.shape[1] == 1
