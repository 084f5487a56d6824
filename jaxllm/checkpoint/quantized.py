"""Tensors that belong together as one quantized weight, as a checkpoint's config declares them."""

from collections.abc import Mapping
from dataclasses import replace

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.fp8 import BlockFP8


def assemble(tensors: Mapping[str, Weight], config: Mapping[str, object]) -> dict[str, Weight]:
    """The tensors of a directory with those of one quantized matrix joined under the matrix's name.

    Args:
        tensors: by name, as they are in the files.
        config: config.json.

    Raises:
        InputError: the quantization is not supported, or a matrix lacks its scales or has scales that do not fit.
    """
    declared = config.get("quantization_config") or config.get("quantization")
    if not declared:
        return dict(tensors)
    if not isinstance(declared, Mapping):
        raise InputError(f"quantization_config is {declared!r}, expected an object")
    method, block = declared.get("quant_method"), declared.get("weight_block_size")
    if method != "fp8" or not block:
        raise InputError(f"quantization '{method}' is not supported; supported: fp8 with weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise InputError(f"weight_block_size is {block!r}, expected two numbers above 0")
    return join_block_fp8(tensors, tuple(block))


def join_block_fp8(
    tensors: Mapping[str, Weight], block: tuple[int, int], weight: str = "", scale: str = "_scale_inv"
) -> dict[str, Weight]:
    """The tensors with those that end in `scale` joined to what they scale, whose names end in `weight` there.

    Raises:
        InputError: an FP8 tensor lacks its scales, or has some that do not fit.
    """
    joined, complaints = {}, []
    for name, tensor in tensors.items():
        if name.endswith(scale):
            continue
        scales_name = name.removesuffix(weight) + scale
        scales = tensors.get(scales_name)
        if scales is not None:
            out, in_ = tensor.shape[-2:]
            want = (-(-out // block[0]), -(-in_ // block[1]))
            if scales.shape[-2:] != want:
                complaints.append(f"'{scales_name}' has shape {list(scales.shape)}, expected {list(want)}")
            joined[name] = BlockFP8(tensor.values, scales.values, block, None)
        elif tensor.format.startswith("float8"):
            complaints.append(f"'{name}' is FP8, but '{scales_name}' is missing")
        else:
            joined[name] = tensor
    if complaints:
        raise InputError("; ".join(complaints[:8]))
    return joined


def with_fp8_activations(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The same tensors, blockwise FP8 ones to be multiplied with activations in FP8, a scale for each block's width.

    Raises:
        InputError: there are no such tensors.
    """
    if not any(isinstance(w, BlockFP8) for w in tensors.values()):
        raise InputError("matmul 'fp8' needs a checkpoint with blockwise FP8 weights")
    return {
        name: replace(w, activation_group=w.block[1]) if isinstance(w, BlockFP8) else w for name, w in tensors.items()
    }
