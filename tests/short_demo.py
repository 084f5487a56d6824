"""The demo with few of its layers: its vocabulary, sizes, types and kernels, but programs that compile in no time."""

import numpy as np

from jaxllm.checkpoint.gguf import open_gguf
from jaxllm.checkpoint.gguf_writing import header
from jaxllm.formats.ggml import GGML
from jaxllm.loading import find_checkpoint


def write(path, layers=2):
    """A GGUF file of the demo's first layers. What it answers is no sense."""
    whole = open_gguf(find_checkpoint("demo"))
    kept = {f"blk.{i}." for i in range(layers)}
    tensors = {
        name: weight
        for name, weight in whole.tensors.items()
        if not name.startswith("blk.") or name[: name.index(".", 4) + 1] in kept
    }
    types = [
        (name, weight.shape, weight.type if isinstance(weight, GGML) else "F32") for name, weight in tensors.items()
    ]
    text, offsets = header(dict(whole.metadata) | {"llama.block_count": layers}, types)
    with path.open("wb") as file:
        file.write(text)
        for offset, weight in zip(offsets, tensors.values(), strict=True):
            file.seek(offset)
            np.asarray(weight.blocks if isinstance(weight, GGML) else weight.values).tofile(file)
    return path
