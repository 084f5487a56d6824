"""Tensors that belong together as one quantized weight, as a checkpoint's config declares them."""

from collections.abc import Mapping

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
    method, block = declared.get("quant_method"), declared.get("weight_block_size")
    if method != "fp8" or not block:
        raise InputError(f"quantization '{method}' is not supported; supported: fp8 with weight_block_size")
    return _block_fp8(tensors, tuple(block))


def _block_fp8(tensors: Mapping[str, Weight], block: tuple[int, int]) -> dict[str, Weight]:
    joined, complaints = {}, []
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scales = tensors.get(f"{name}_scale_inv")
        if scales is not None:
            out, in_ = tensor.shape[-2:]
            want = (-(-out // block[0]), -(-in_ // block[1]))
            if scales.shape[-2:] != want:
                complaints.append(f"'{name}_scale_inv' has shape {list(scales.shape)}, expected {list(want)}")
            joined[name] = BlockFP8(tensor.values, scales.values, block, False)
        elif tensor.format.startswith("float8"):
            complaints.append(f"'{name}' is FP8, but '{name}_scale_inv' is missing")
        else:
            joined[name] = tensor
    if complaints:
        raise InputError("; ".join(complaints[:8]))
    return joined
