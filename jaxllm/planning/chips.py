"""What the makers of chips publish about them: the limits that a program cannot pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        kinds: parts of the names that JAX may give it (`device_kind`).
        memory: bytes that a device holds.
        bandwidth: memory bandwidth, bytes per second.
        flops, flops_fp8, flops_int8: dense operations per second with operands in bfloat16, FP8 and int8. Where a chip
            has no such products, those of bfloat16.
        links: bytes per second that leave a device for others of its pod or node: half of what is published, which
            counts both directions. (GPUs of different nodes have less than that between them.)
        source: where the numbers are from.
    """

    kinds: tuple[str, ...]
    memory: float
    bandwidth: float
    flops: float
    flops_fp8: float
    flops_int8: float
    links: float
    source: str


TPU_PAGES = "Google Cloud's pages on TPU {0} (chip specifications)"
GIB = 2**30

# A TPU7x chip has two devices, so these are half of the chip's numbers; those of v4 and v5p share theirs.
CHIPS = {
    "v4": Chip(("TPU v4",), 32 * GIB, 1228e9, 275e12, 275e12, 275e12, 150e9, TPU_PAGES.format("v4")),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 16 * GIB, 819e9, 197e12, 197e12, 394e12, 200e9, TPU_PAGES.format("v5e")),
    "v5p": Chip(("TPU v5p", "TPU v5"), 95 * GIB, 2765e9, 459e12, 459e12, 918e12, 600e9, TPU_PAGES.format("v5p")),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 32 * GIB, 1640e9, 918e12, 918e12, 1836e12, 400e9, TPU_PAGES.format("v6e")),
    "tpu7x": Chip(
        ("TPU7x", "TPU v7"), 96 * GIB, 3690e9, 1153e12, 2307e12, 1153e12, 300e9, TPU_PAGES.format("7x (Ironwood)")
    ),
    "h100": Chip(("H100",), 80e9, 3352e9, 989e12, 1979e12, 1979e12, 450e9, "NVIDIA's data sheet of the H100 SXM"),
    "h200": Chip(("H200",), 141e9, 4800e9, 989e12, 1979e12, 1979e12, 450e9, "NVIDIA's data sheet of the H200 SXM"),
    "b200": Chip(("B200",), 180e9, 8000e9, 2250e12, 4500e12, 4500e12, 900e9, "NVIDIA's data sheet of the HGX B200"),
}
