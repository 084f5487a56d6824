"""Small pictures for notebooks, as SVG: what fills a device's memory, and where a program stands under the roofline."""

import html
import math
from collections.abc import Mapping

WIDTH, HEIGHT = 640, 240
COLORS = "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"
GIB = 2**30


def memory_bars(parts: Mapping[str, float], memory: float) -> str:
    """A bar of parts (bytes by name), beside the memory that they have to fit into."""
    scale = (WIDTH - 20) / max(memory, sum(parts.values()), 1)
    drawn, at = [], 10.0
    for i, (name, nbytes) in enumerate(parts.items()):
        title = html.escape(f"{name}: {nbytes / GIB:.2f} GiB")
        color, width, line = COLORS[i % len(COLORS)], nbytes * scale, 78 + 16 * i
        drawn.append(
            f'<rect x="{at:.1f}" y="12" width="{width:.1f}" height="32" fill="{color}"><title>{title}</title></rect>'
            f'<rect x="10" y="{line - 9}" width="10" height="10" fill="{color}"/>{_text(26, line, title)}'
        )
        at += width
    edge = 10 + memory * scale
    drawn.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="6" y2="50" stroke="black" stroke-width="2"/>')
    drawn.append(_text(10, 62, f"black line: the device's {memory / GIB:.2f} GiB"))
    return _svg(drawn, 78 + 16 * len(parts))


def roofline(points: Mapping[str, float], bandwidth: float, flops: Mapping[str, float]) -> str:
    """The most operations per second by operations per byte, both logarithmic, and where programs stand (Williams,
    Waterman and Patterson, 2009).

    Args:
        points: operations per byte that each program reads.
        bandwidth: bytes per second.
        flops: operations per second, by the type of the operands.
    """
    top, ridge = max(flops.values()), max(flops.values()) / bandwidth
    left, right = min(0.5, *points.values()) / 2, 4 * max(ridge, *points.values())
    low = bandwidth * left

    def x(intensity: float) -> float:
        return 10 + (WIDTH - 20) * math.log(intensity / left) / math.log(right / left)

    def y(rate: float) -> float:
        return HEIGHT - 30 - (HEIGHT - 50) * math.log(rate / low) / math.log(top / low)

    drawn = []
    for i, (rate, names) in enumerate(sorted(_by_rate(flops).items())):
        corner = rate / bandwidth
        path = f"{x(left):.1f},{y(low):.1f} {x(corner):.1f},{y(rate):.1f} {x(right):.1f},{y(rate):.1f}"
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[i]}" stroke-width="2"/>')
        drawn.append(_text(WIDTH - 200, y(rate) - 4, f"{names}: {rate / 1e12:.0f} TFLOP/s"))
    for name, intensity in points.items():
        reached = min(flops["bfloat16"], bandwidth * intensity)
        drawn.append(f'<circle cx="{x(intensity):.1f}" cy="{y(reached):.1f}" r="5"/>')
        drawn.append(_text(min(x(intensity) + 8, WIDTH - 150), y(reached) + 14, f"{name}: {intensity:.3g} FLOP/B"))
    drawn.append(_text(10, HEIGHT - 8, f"operations per byte read; the slope is {bandwidth / 1e12:.2f} TB/s"))
    return _svg(drawn, HEIGHT)


def _by_rate(flops: Mapping[str, float]) -> dict[float, str]:
    return {rate: ", ".join(n for n, other in flops.items() if other == rate) for rate in flops.values()}


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" font-family="sans-serif">{text}</text>'


def _svg(drawn: list[str], height: float) -> str:
    box = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(drawn)}</svg>'
