"""Which attention head stands on which device, for any number of heads and devices.

The seeds (`compute_kv_shard`, `compute_n_kv_groups` of mistral.rs) demand that heads divide the devices or devices
divide the heads. Here both are first brought to sizes that do: key/value heads are padded with zero heads up to a
multiple of tp, or, where tp is larger, to a divisor of tp and then held by tp / n of the devices each, which share that
head's queries. A zero query head meets zero columns in the output projection, so the result is exact.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxllm.errors import InputError


@dataclass(frozen=True)
class HeadLayout:
    """Heads of the checkpoint in the order they are placed, -1 for a zero head. Equal contiguous parts go to devices.

    query: `[tp * queries per device]`, those of one key/value head together.
    kv: `[tp * key/value heads per device]`.
    """

    query: np.ndarray
    kv: np.ndarray

    def rows(self, heads: np.ndarray, head_dim: int) -> np.ndarray:
        """Positions of a projection's rows (or columns) when `heads` of `head_dim` each are placed."""
        rows = heads[:, None] * head_dim + np.arange(head_dim)
        return np.where(heads[:, None] < 0, -1, rows).reshape(-1)


def place_heads(num_heads: int, num_kv_heads: int, tp: int, head_dim: int = 1, block: int = 1) -> HeadLayout:
    """Spread heads over `tp` devices so that each holds whole blocks of the output projection's columns.

    Args:
        head_dim: columns of the output projection per query head.
        block: block size of that projection's format along its columns.

    Raises:
        InputError: query heads that do not share the key/value heads evenly.
    """
    if num_heads % num_kv_heads:
        raise InputError(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    group = num_heads // num_kv_heads
    unit = block // math.gcd(block, head_dim)  # query heads that fill whole blocks
    if tp <= num_kv_heads or (num_kv_heads > 1 and group % unit):
        # Whole groups to a device. The second case, blocks that span groups, leaves some devices with zeros only.
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
