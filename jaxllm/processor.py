"""What this machine's CPU is called and has."""

import functools
import os
import platform
from pathlib import Path


@functools.cache
def _fields() -> dict[str, str]:
    """What Linux says of the last core; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def flags() -> frozenset[str]:
    """Names of its instruction sets, such as "avx2" and "avx512_bf16"; none where the system does not say."""
    fields = _fields()
    return frozenset((fields.get("flags") or fields.get("Features", "")).split())


def has_bfloat16() -> bool:
    """Whether it multiplies bfloat16. Others emulate it, and are faster with float32 at everything."""
    return bool(flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def describe() -> str:
    """Its name, its cores, and what it has for small numbers, for whoever reads measurements."""
    name = _fields().get("model name") or platform.processor() or platform.machine()
    has = [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "asimddp") if flag in flags()]
    return f"{os.cpu_count()} cores of {name} ({', '.join(has) or 'no vectors for small integers'})"
