"""A layer as UQFF 0.2 has it, bytes with a header, from the tensors that version 1.x has for it: see `uqff_legacy`."""

import math
import struct

import numpy as np

from jaxllm.checkpoint.exports_integers import Laid
from jaxllm.checkpoint.repack import derived
from jaxllm.checkpoint.uqff_legacy import BYTES, DTYPES, FIELDS, MINOR, SHAPE, TENSOR
from jaxllm.placing import DerivedArray

LAST_OF_0_1 = 4  # the last kind that version 0.1 has; its layers are those of 0.2, so that older readers take them
_CODES = {np.dtype(dtype): code for code, dtype in enumerate(DTYPES)}
_Piece = bytes | DerivedArray


def layer(laid: Laid, code: int, bias: DerivedArray | None) -> DerivedArray:
    """The bytes of a layer, uint8 `[n]`, computed when they are read.

    Args:
        laid: its tensors, by the end of their names, from `exports_uqff.lay`.
        code: the number of its kind.
    """
    pieces: list[_Piece] = [struct.pack("<IB", (1 if code <= LAST_OF_0_1 else MINOR) << 8, code)]
    pieces += [struct.pack("<I", _nbytes(laid[".weight"]))] if code == 0 else []
    pieces.append(struct.pack("<B", bias is not None))
    for name, field in FIELDS[code]:
        array = laid[f".weight{name}"]
        if field == TENSOR:
            pieces += _tensor(array)
        elif field == SHAPE:
            pieces += [struct.pack("<I", array.shape[0]), array]
        else:
            assert field == BYTES or array.dtype == np.dtype(field)
            pieces.append(array)
    pieces += [] if bias is None else _tensor(bias)

    def joined() -> np.ndarray:
        return np.frombuffer(b"".join(p if isinstance(p, bytes) else p.read().tobytes() for p in pieces), np.uint8)

    return derived((sum(len(p) if isinstance(p, bytes) else _nbytes(p) for p in pieces),), np.uint8, joined)


def _nbytes(array: DerivedArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _tensor(array: DerivedArray) -> list[_Piece]:
    shape = array.shape
    return [struct.pack(f"<III{len(shape)}I", _nbytes(array), _CODES[array.dtype], len(shape), *shape), array]
