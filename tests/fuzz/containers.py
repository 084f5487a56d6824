"""Files of tensors with other tensors or entries, whose header is right: what is refused only further inside."""

import json
import random
import struct
from math import prod

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}
WIDTHS |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """One tensor with another name, dtype, shape or content, left out, or there twice."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = entry["dtype"], entry["shape"], data[begin + first : begin + last]
    name = rng.choice(sorted(tensors))
    dtype, shape, content = tensors.pop(name)
    way = rng.choice(("gone", "renamed", "twice", "dtype", "shape", "shape", "shape", "content", "content"))
    if way == "dtype":
        dtype = rng.choice([other for other, width in WIDTHS.items() if width == WIDTHS[dtype]])
    elif way == "shape":
        shape, content = _shaped(rng, shape, content, WIDTHS[dtype])
    elif way == "content":
        content = _filled(rng, content, WIDTHS[dtype])
    if way in ("renamed", "twice"):
        other = rng.choice((name + "x", name.upper(), name.replace("0", "1", 1), *sorted(tensors)))
        tensors[other] = dtype, shape, content
    if way not in ("renamed", "gone"):
        tensors[name] = dtype, shape, content
    made, end, parts = {"__metadata__": metadata}, 0, []
    for name, (dtype, shape, content) in sorted(tensors.items(), key=lambda item: -WIDTHS[item[1][0]]):
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
        parts.append(content)
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _shaped(rng: random.Random, shape: list[int], content: bytes, width: int) -> tuple[list[int], bytes]:
    size = prod(shape)
    shapes = [shape[::-1], [1, *shape], [*shape, 1], [size], [], [0, *shape[1:]], [1] * 9 + shape]
    if shape:
        shapes += [[n + by, *shape[1:]] for n in shape[:1] for by in (-1, 1)] + [[*shape[:-1], shape[-1] * 2]]
        shapes += [[*shape[:-1], n] for n in (shape[-1] // 2, shape[-1] + 1)]
    new = rng.choice([each for each in shapes if min(each, default=0) >= 0])
    need = prod(new) * width
    return new, (content * (need // max(len(content), 1) + 1))[:need]


def _filled(rng: random.Random, content: bytes, width: int) -> bytes:
    one = rng.choice(
        (b"\xff" * width, b"\0" * width, b"\x7f" * width, (b"\0" * width + b"\x80\x7f")[-width:], rng.randbytes(width))
    )
    if rng.random() < 0.5 or not content:
        return (one * len(content))[: len(content)]
    place = rng.randrange(len(content)) // width * width
    return (content[:place] + one + content[place + width :])[: len(content)]


def gguf(rng: random.Random, data: bytes) -> bytes:
    """One entry or tensor with another name, type, value or shape, left out, or there twice (of version 2 or 3)."""
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    offset, entries, infos = 24, [], []
    for _ in range(keys):
        key, begin = _string(data, offset)
        offset = _end(data, begin + 4, struct.unpack_from("<I", data, begin)[0])
        entries.append((key, data[begin:offset]))
    for _ in range(tensors):
        name, begin = _string(data, offset)
        rank = struct.unpack_from("<I", data, begin)[0]
        offset = begin + 4 + 8 * rank + 12
        infos.append((name, data[begin:offset]))
    rest = data[-(-offset // 32) * 32 :]
    of = rng.choice((entries, entries, infos)) if infos else entries
    i = rng.randrange(len(of))
    (name, value), (other_name, other_value) = of[i], rng.choice(of)
    changes = [(name, other_value), (other_name, value), (name, value[: len(value) // 2]), None]
    changes += [(name, _number(rng, of is infos, value))] * 5
    changed = rng.choice(changes)
    of[i : i + 1] = [changed] if changed else []
    if rng.random() < 0.1:
        of.append((name + rng.choice((b"", b"x")), value))
    head = data[:8] + struct.pack("<QQ", len(infos), len(entries))
    head += b"".join(struct.pack("<Q", len(key)) + key + value for key, value in [*entries, *infos])
    return head + b"\0" * (-len(head) % 32) + rest


def _number(rng: random.Random, tensor: bool, value: bytes) -> bytes:
    """A tensor with another type or dimension, or a value that is a number of some type."""
    if tensor:
        place = rng.choice(range(0, len(value) - 3, 4))
        number = rng.choice((0, 1, 2, 3, 8, 12, 30, 39, 64, 255, 2**31, 2**32 - 1))
        return value[:place] + struct.pack("<I", number) + value[place + 4 :]
    number = rng.choice((0, 1, 2, 7, 255, 2**24, 2**31 - 1, 2**31, 2**32 - 1))
    choices = (
        struct.pack("<II", 4, number),
        struct.pack("<Ii", 5, -(number // 2)),
        struct.pack("<If", 6, rng.choice((0.0, -1.0, 1e38, float("inf"), float("nan")))),
        struct.pack("<I?", 7, True),
        struct.pack("<IQ", 10, number**2),
        struct.pack("<IQ", 8, 3) + rng.choice((b"abc", b"\xff\xff\xff", b"\n\x1b[")),
        struct.pack("<IIQ", 9, 4, 0),
        struct.pack("<IIQII", 9, 4, 2, number, 1),
        struct.pack("<IIQQ", 9, 8, 1, 1) + b"x",
    )
    return rng.choice(choices)


def _string(data: bytes, offset: int) -> tuple[bytes, int]:
    end = offset + 8 + struct.unpack_from("<Q", data, offset)[0]
    return data[offset + 8 : end], end


def _end(data: bytes, offset: int, kind: int) -> int:
    """Where a value of this type ends."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    if kind == 8:
        return _string(data, offset)[1]
    if kind != 9:
        return offset + sizes[kind]
    item, count = struct.unpack_from("<IQ", data, offset)
    offset += 12
    if item != 8:
        return offset + sizes[item] * count
    for _ in range(count):
        offset = _string(data, offset)[1]
    return offset
