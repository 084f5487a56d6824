"""Eight emulated CPU devices, strict dtypes, and a compilation cache that stays inside the checkout."""

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


@pytest.fixture(scope="session")
def load_once():
    """`jaxllm.load`, but the same arguments give the same model: compiled programs are shared between tests."""
    loaded = {}

    def load(path, **options):
        key = str(path), tuple(sorted(options.items()))
        if key not in loaded:
            loaded[key] = jaxllm.load(path, progress=False, **options)
        return loaded[key]

    return load
