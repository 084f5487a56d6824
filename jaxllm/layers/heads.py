"""Which device holds which attention head, for any number of heads and devices.

mistral.rs (`compute_kv_shard`, `compute_n_kv_groups`) requires that the number of heads divide the number of devices,
or the other way around. Here heads are padded until one does: key/value heads get zero heads up to a multiple of tp. If
tp is larger, they get zero heads up to a divisor n of tp; each is then replicated on tp / n devices, which share that
head's queries. A zero query head meets zero columns in the output projection, so the result is exact.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxllm.errors import InputError


@dataclass(frozen=True)
class HeadLayout:
    """The checkpoint's heads in the order of their placement; -1 is a zero head. Each device gets an equal slice.

    query: `[tp * queries per device]`; query heads that share a key/value head are adjacent.
    kv: `[tp * key/value heads per device]`.
    """

    query: np.ndarray
    kv: np.ndarray

    def rows(self, heads: np.ndarray, head_dim: int) -> np.ndarray:
        """Indices of a projection's rows (or columns) for `heads` of `head_dim` rows each."""
        rows = heads[:, None] * head_dim + np.arange(head_dim)
        return np.where(heads[:, None] < 0, -1, rows).reshape(-1)


def place_heads(num_heads: int, num_kv_heads: int, tp: int, head_dim: int = 1, block: int = 1) -> HeadLayout:
    """Spread heads over `tp` devices so that each holds complete blocks of the output projection's columns.

    Args:
        head_dim: columns of the output projection per query head.
        block: block size of that projection's format along its columns.

    Raises:
        InputError: the number of query heads is not a multiple of the number of key/value heads.
    """
    if num_heads % num_kv_heads:
        raise InputError(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    group = num_heads // num_kv_heads
    unit = block // math.gcd(block, head_dim)  # query heads that fill complete blocks
    if tp <= num_kv_heads or (num_kv_heads > 1 and group % unit):
        # Complete groups per device. The second case, blocks that span groups, leaves some devices with zeros only.
        whole = math.lcm(unit, group)
        per_device = math.ceil(math.ceil(num_kv_heads / tp) * group / whole) * whole // group
        kv = _padded(num_kv_heads, per_device * tp)
        return HeadLayout(np.where(kv[:, None] < 0, -1, kv[:, None] * group + np.arange(group)).reshape(-1), kv)

    placed_kv = next(n for n in range(num_kv_heads, tp + 1) if tp % n == 0)
    copies = tp // placed_kv
    share = math.ceil(math.ceil(group / copies) / unit) * unit  # queries of one head on each device that holds it
    kv = _padded(num_kv_heads, placed_kv)
    member = _padded(group, share * copies)
    query = np.where((kv[:, None] < 0) | (member < 0), -1, kv[:, None] * group + member)
    return HeadLayout(query.reshape(-1), np.repeat(kv, copies))


def _padded(count: int, size: int) -> np.ndarray:
    index = np.arange(size)
    return np.where(index < count, index, -1)
