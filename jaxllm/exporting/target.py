"""What users name, a type and perhaps a container, as something that can be written."""

from jaxllm.checkpoint.exports import EXPORTS, export
from jaxllm.encodings import ENCODINGS, NUMBERS
from jaxllm.errors import InputError
from jaxllm.formats.ggml_encode import ENCODERS

CONTAINERS = ("huggingface", "mlx", "gguf", "uqff")  # of several that hold a type, the first is used
MIXED = ("gguf", "uqff")  # which mix types
# What mistral.rs reads; others it would not.
UQFF = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "hqq4", "hqq8", "fp8", "f8q8", "mxfp4"}
UQFF |= {f"q{bits}_k" for bits in (2, 3, 4, 5, 6)} | {f"afq{bits}" for bits in (2, 3, 4, 6, 8)}
_PLAIN = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def target(to: str | int, container: str | None) -> tuple[str, str]:
    """The type's name and the container, from what users write.

    Raises:
        InputError: no container holds this type, or not this one.
    """
    known = {name.replace("_", ""): name for name in (*ENCODINGS, *(name for _, name in EXPORTS))} | _PLAIN
    squeezed = str(to).lower().replace("_", "").replace("-", "")
    if squeezed not in known and squeezed not in NUMBERS:
        names = ", ".join((*(n for n in sorted({*known.values()}) if _holders(n)), *NUMBERS))
        raise InputError(f"cannot write '{to}'; known are {names}")
    name = known.get(squeezed) or NUMBERS[squeezed]
    if container is not None and container not in CONTAINERS:
        raise InputError(f"container '{container}': choose one of {', '.join(CONTAINERS)}")
    holders = _holders(name)
    if not holders:
        raise InputError(f"no container holds {name}; these do: {', '.join(sorted({n for _, n in EXPORTS}))}")
    if container is None:
        container = holders[0]
    elif container not in holders:
        raise InputError(f"{container} cannot hold {name}; {', '.join(holders)} can")
    return name, container


def _holders(name: str) -> list[str]:
    in_gguf = name.upper() in ENCODERS or name in _PLAIN.values()
    others = {"gguf": in_gguf, "uqff": name in UQFF}
    return [c for c in CONTAINERS if (c, name) in EXPORTS or others.get(c)]


def made_by(name: str, container: str) -> str | None:
    """The encoding that makes a type's weights; None: its own calibration does."""
    made = name if container in MIXED else export(container, name).encoding
    return made if container in MIXED or made in ENCODINGS else None
