"""Startup times: from the start of a process to a model's first token, and to compile the largest model's decode step.

`jaxllm bench` prints them. Each measurement runs in a new process, as users start them.
"""

import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

from jaxllm.errors import InputError

FIRST_TOKEN = """
import sys, time
import psutil
import jaxllm
model = jaxllm.load(sys.argv[1], dtype=sys.argv[2] or None, progress=False)
next(model.stream("Once upon a time,", 2))
print(time.time() - psutil.Process().create_time())
"""

# One device's view of a decode step of all 61 layers: nothing is read and nothing is run.
DEEPSEEK_V3 = """
import time
from jaxllm.models.deepseek.config import PRESETS, DeepseekConfig
from jaxllm.models.deepseek.model import deepseek
from jaxllm.parallel import make_mesh
from jaxllm.plan import deepseek_fp8, fill_with_shapes, lower_decode
mesh, begun = make_mesh("tp=1"), time.perf_counter()
model = deepseek(DeepseekConfig.from_demo(PRESETS["deepseek-v3-671b"]), mesh)
fill_with_shapes(model, mesh, deepseek_fp8())
lowered = lower_decode(model, mesh, 1, 4096)
lowered.compile()
print(time.perf_counter() - begun)
"""


class Startup(NamedTuple):
    """Seconds until the first token, without and with compiled programs on disk, and until DeepSeek-V3's decode step is
    compiled from shapes."""

    cold: float
    warm: float
    deepseek_v3: float


def measure_startup(model: str, dtype: str | None) -> Startup:
    """Raises InputError if one of the processes fails."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_seconds(FIRST_TOKEN, cache, model, dtype or "") for _ in range(2))
        return Startup(cold, warm, _seconds(DEEPSEEK_V3, cache))


def _seconds(code: str, cache: str, *args: str) -> float:
    """The number that a process prints which runs `code` with `cache` as its compilation cache."""
    env = os.environ | {"XDG_CACHE_HOME": cache}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env)
    if done.returncode:
        raise InputError((done.stderr.strip().splitlines() or ["failed"])[-1])
    return float(done.stdout)
