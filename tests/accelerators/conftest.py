"""Programs for accelerators are compiled as users have them compiled."""

import jax
import pytest


@pytest.fixture(autouse=True)
def optimized():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
