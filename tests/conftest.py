"""Eight emulated CPU devices, strict dtypes, and a compilation cache that stays inside the checkout."""

import gc
import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xdg"
os.environ["XDG_CACHE_HOME"] = str(CACHE)  # read by jaxllm, in this process and in the command lines that tests start
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

import jaxllm  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program is several mappings of memory, of which a process may have some ten thousands: without
    this, a worker that runs many files dies of a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def load_once(forget_programs):
    """`jaxllm.load`, but the same arguments give the same model, and compiled programs, to all tests of a file."""
    loaded = {}

    def load(path, **options):
        key = str(path), tuple(sorted(options.items()))
        if key not in loaded:
            loaded[key] = jaxllm.load(path, progress=False, **options)
        return loaded[key]

    return load
