"""Memory for weights: what JAX uses where it lies."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm import memory
from jaxllm.parallel import make_mesh


@pytest.mark.parametrize("size", [1, 100, memory.CHUNK // 2, memory.CHUNK // 2 + 1])
def test_jax_does_not_copy_it(size):
    array = memory.zeros((size,), np.dtype(np.uint8))
    assert not array.any()
    sharding = NamedSharding(make_mesh("tp=1"), PartitionSpec())
    placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array)
    assert placed.addressable_shards[0].data.unsafe_buffer_pointer() == array.ctypes.data


def test_no_two_arrays_share_a_byte():
    arrays = [memory.zeros((4, 3, 2), np.dtype(np.float32)) for _ in range(100)]
    for i, array in enumerate(arrays):
        array[...] += i
    for i, array in enumerate(arrays):
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, i)
    assert memory.zeros((0, 3), np.dtype(np.int8)).shape == (0, 3)
