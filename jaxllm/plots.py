"""Pictures for notebooks: who holds what, what fills the memory, what bounds the speed, what bits cost.

They need matplotlib (`pip install 'jaxllm[plots]'`). A notebook shows what these functions return; `savefig` writes it
to a file. Nothing here touches `matplotlib.pyplot`, whose figures would be shown twice and stay in memory.
"""

import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.planning.report import Limits, Phase, Plan
from jaxllm.tracking import Statistics

try:
    from matplotlib import color_sequences
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise InputError("jaxllm.plots draws with matplotlib: pip install 'jaxllm[plots]'") from error

__all__ = ["Picture", "expert_load", "levels", "memory", "quality", "roofline", "shards"]

GIB = 2**30
COLORS = color_sequences["tab20"][::2] + color_sequences["tab20"][1::2]  # the dark ones first


class Picture(Figure):
    """A figure that notebooks show by themselves."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()


def _panels(count: int, width: float, height: float) -> tuple[Picture, list[Axes]]:
    """A picture of `count` panels in a row, each of this size in inches."""
    picture = Picture(figsize=(width * count, height), layout="constrained")
    return picture, list(picture.subplots(1, count, squeeze=False)[0])


def shards(matrices: Mapping[str, Weight | jax.Array]) -> Picture:
    """Who holds what: a panel for each matrix, where each shard has the color and the number of its device.

    Shards that several devices hold have the numbers of all of them, and what every device holds is white. Of a stack
    of experts, the panel has the experts from top to bottom, and from left to right the dimension that is sharded.

    Args:
        matrices: weights `[out, in]` or stacks `[experts, out, in]` of any format, placed on a mesh; or arrays. Shapes
            with a sharding suffice.

    Raises:
        InputError: a weight is not placed on devices.
    """
    picture, axes = _panels(len(matrices), 2.6, 2.8)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        leaf = matrix.leaf(next(iter(matrix.axes))) if isinstance(matrix, Weight) else matrix
        if not isinstance(getattr(leaf, "sharding", None), jax.sharding.Sharding):
            raise InputError(f"{name} is not placed on devices: load its model, or make a layer with from_weight()")
        rows, cols, labels = 0, 1, ("out", "in")
        if len(matrix.shape) == 3:
            split = leaf.sharding.shard_shape(leaf.shape)[2] < leaf.shape[2]
            rows, cols, labels = 0, 1 + split, ("experts", "in" if split else "out")
        _draw_shards(axis, leaf, rows, cols)
        axis.set(title=f"{name}\n{' x '.join(map(str, matrix.shape))}", xlabel=labels[1], ylabel=labels[0])
    return picture


def _draw_shards(axis: Axes, leaf: jax.Array, rows: int, cols: int) -> None:
    """A rectangle for each part of two dimensions of an array that a device holds."""
    owners: dict[tuple[slice, ...], list[int]] = {}
    everyone: dict[Any, Any] = dict(leaf.sharding.devices_indices_map(leaf.shape))
    for device, index in everyone.items():
        owners.setdefault((index[rows], index[cols]), []).append(device.id)
    height, width = leaf.shape[rows], leaf.shape[cols]
    for (y, x), devices in owners.items():
        (top, bottom, _), (left, right, _) = y.indices(height), x.indices(width)
        color = "white" if len(devices) == len(everyone) > 1 else COLORS[devices[0] % len(COLORS)]
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="black", lw=0.5))
        text = "all" if len(devices) == len(everyone) > 1 else " ".join(map(str, devices))
        if len(owners) <= 32:
            axis.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center", fontsize=8)
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())


def memory(plans: Mapping[str, Plan]) -> Picture:
    """What fills a device's memory: a bar for each of the plans, by name, and a black line where its device ends."""
    parts = {
        name: {**plan.weights, "cache": plan.cache, "temporaries": max(plan.temporaries.values())}
        for name, plan in plans.items()
    }
    colors = dict(zip(dict.fromkeys(part for held in parts.values() for part in held), COLORS, strict=False))
    picture, [axis] = _panels(1, 8, 1 + 0.45 * len(plans))
    for y, (name, held) in enumerate(parts.items()):
        left = 0.0
        for part, nbytes in held.items():
            axis.barh(y, nbytes / GIB, left=left, height=0.6, color=colors[part], label=part)
            left += nbytes / GIB
        axis.vlines(plans[name].limits.memory / GIB, y - 0.4, y + 0.4, color="black")
    axis.set(xlabel="GiB on each device", yticks=range(len(parts)), yticklabels=parts, ylim=(len(parts) - 0.5, -0.5))
    _legend(axis, title="black: what a device has")
    return picture


def _legend(axis: Axes, title: str | None = None) -> None:
    """A legend beside the panel, each label once."""
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(once.values(), once, title=title, fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def roofline(plans: Mapping[str, Plan]) -> Picture:
    """What bounds the speed: operations per second by operations per byte read, both logarithmic (Williams, Waterman
    and Patterson, 2009). Under the slope the memory binds, under the flat part the arithmetic, in bfloat16. Circles are
    decode steps, squares prompts, of each of the plans; a program cannot be above its roof.

    Raises:
        InputError: nothing is known of a plan's devices.
    """
    picture, [axis] = _panels(1, 8, 3.5)
    roofs: dict[str, Limits] = {}
    for name, plan in plans.items():
        if plan.limits.bandwidth is None:
            raise InputError(f"{name}: no limits are published for {plan.topology}, so it has no roofline")
        roofs[plan.topology.partition(":")[0]] = plan.limits
    points = [_intensity(phase) for plan in plans.values() for phase in (plan.decode, plan.prefill)]
    reach = np.geomspace(min(points) / 4, 4 * max(*points, *(_ridge(limits) for limits in roofs.values())), 200)
    for chip, limits in roofs.items():
        axis.plot(reach, [_attainable(limits, x) for x in reach], color="gray", linewidth=1)
        flat = f"{chip}: {limits.flops['bfloat16'] / 1e12:.0f} TFLOP/s"
        axis.text(reach[-1], 1.1 * limits.flops["bfloat16"], flat, ha="right", va="bottom", fontsize=8)
    for (name, plan), color in zip(plans.items(), COLORS, strict=False):
        for phase, marker in ((plan.decode, "o"), (plan.prefill, "s")):
            x = _intensity(phase)
            axis.plot(x, _attainable(plan.limits, x), marker, color=color, label=name)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="operations per second, at most")
    _legend(axis, title="circle: decode, square: prompts")
    return picture


def _intensity(phase: Phase) -> float:
    return phase.flops / phase.nbytes


def _ridge(limits: Limits) -> float:
    assert limits.bandwidth is not None
    return limits.flops["bfloat16"] / limits.bandwidth


def _attainable(limits: Limits, intensity: float) -> float:
    assert limits.bandwidth is not None
    return min(limits.flops["bfloat16"], limits.bandwidth * intensity)


Measured = Mapping[str, tuple[float, float]]


def quality(
    measured: Measured, *improved: Measured, reference: float | None = None, metric: str = "perplexity"
) -> Picture:
    """Bits against quality: a point for each type.

    Args:
        measured: by type, its bits per weight and what was measured.
        improved: the same types with something that helps them, such as an importance matrix: triangles, connected with
            the first points.
        reference: what the model has as it is: a dashed line.
        metric: what was measured, as the label of the vertical axis, which is logarithmic.
    """
    picture, [axis] = _panels(1, 8, 4.5)
    if reference is not None:
        axis.axhline(reference, color="gray", linewidth=0.8, linestyle="--")
    names: dict[str, tuple[float, float]] = {}
    for series, marker, color in zip((measured, *improved), "o^vs", COLORS, strict=False):
        for name, (bits, value) in series.items():
            if name in names:
                axis.plot(*zip(names[name], (bits, value), strict=True), color=color, linewidth=0.8)
            axis.plot(bits, value, marker, color=color, markersize=4)
            names[name] = bits, value
    for name, point in names.items():
        axis.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="bits per weight", ylabel=metric, yscale="log")
    return picture


def levels(values: np.ndarray, weights: Mapping[str, Weight]) -> Picture:
    """What a block can hold: each of the values from left to right, and the value that it has in each format below.

    Args:
        values: float `[n]`, the beginning of a matrix's first row.
        weights: that matrix in several formats, not sharded.
    """
    picture, axes = _panels(len(weights), 2.6, 2.6)
    for axis, (name, weight) in zip(axes, weights.items(), strict=True):
        held = np.asarray(weight.dequantize())[0, : len(values)]
        axis.hlines(np.unique(held), values.min(), values.max(), color="lightgray", linewidth=0.6)
        axis.plot(values, values, color="gray", linewidth=0.6)
        axis.plot(values, held, ".", markersize=4, color=COLORS[0])
        axis.set(title=f"{name}\n{weight.bits_per_weight:.4g} bits a weight", xlabel="value")
    axes[0].set(ylabel="value as it is held")
    return picture


def expert_load(statistics: Mapping[str, Statistics]) -> Picture:
    """Which experts are chosen: a row for each layer, a column for each expert, and how many tokens chose it.

    Args:
        statistics: what a model's `end_track_stats` returned.

    Raises:
        InputError: no layer has experts.
    """
    counts = {name: np.asarray(s.counts) for name, s in statistics.items() if name.endswith("experts.down_proj")}
    if not counts:
        raise InputError("none of these statistics are of experts")
    picture, [axis] = _panels(1, 7, 1 + 0.3 * len(counts))
    image = axis.imshow(list(counts.values()), aspect="auto", cmap="Blues", vmin=0)
    layers = [name.split(".")[1] for name in counts]
    axis.set(xlabel="expert", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
    picture.colorbar(image, ax=axis, label="tokens")
    return picture
