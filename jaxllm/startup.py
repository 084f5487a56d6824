"""Startup times: from the start of a process to a model's first token, and to compile the largest model's decode step.

`jaxllm bench` prints them. Each measurement runs in a new process, as users start them.
"""

import os
import subprocess
import sys
import tempfile
import time
from subprocess import PIPE
from typing import NamedTuple

from jaxllm.errors import InputError

PROMPT = "Once upon a time,"

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
        command = ["-m", "jaxllm", "generate", "--model", model, "--prompt", PROMPT, "--raw", "--max-new-tokens", "2"]
        command += [] if dtype is None else ["--dtype", dtype]
        (cold, _), (warm, _) = (_run(command, cache) for _ in range(2))
        return Startup(cold, warm, float(_run(["-c", DEEPSEEK_V3], cache)[1]))


def _run(arguments: list[str], cache: str) -> tuple[float, str]:
    """The seconds until a new Python with `cache` as its compilation cache prints something, and all that it prints."""
    env = os.environ | {"XDG_CACHE_HOME": cache}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has bytecode, and compiling it takes 0.3 s
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=PIPE, stderr=PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        begins = process.stdout.read(1)
        seconds = time.perf_counter() - begun
        rest, said = process.communicate()
    if process.returncode:
        raise InputError((said.strip().splitlines() or ["failed"])[-1])
    return seconds, begins + rest
