"""The definitions of the kernels against products in float64."""

from types import SimpleNamespace

from kernel_cases import AttentionCases, BlockFP8Cases, MXFP4Cases

from jaxllm.kernels.attention import attend
from jaxllm.kernels.block_fp8 import reference as block_fp8
from jaxllm.kernels.mxfp4 import reference as mxfp4


class TestMXFP4(MXFP4Cases):
    module = mxfp4


class TestBlockFP8(BlockFP8Cases):
    module = block_fp8


class TestAttention(AttentionCases):
    module = SimpleNamespace(attention=attend)

    def test_blocks_that_nobody_sees_are_not_read(self):
        """They are."""
