"""`Plan`: what planning found out, as text, as JSON, and as a picture in notebooks."""

import dataclasses
import html
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.errors import InputError
from jaxllm.planning import picture
from jaxllm.planning.chips import CHIPS, Chip
from jaxllm.planning.compiling import Collective
from jaxllm.tables import table

GIB = 2**30
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Limits:
    """What one device cannot pass.

    Attributes:
        memory: bytes.
        bandwidth: of the memory, bytes per second; None: not known, and so there are no bounds.
        flops: operations per second, by the type of the operands. Our programs multiply in bfloat16.
        links: bytes per second that leave a device for others.
        source: where these numbers are from.
    """

    memory: float
    bandwidth: float | None
    flops: Mapping[str, float]
    links: float | None
    source: str

    @classmethod
    def of(cls, chip: Chip) -> Self:
        """What is published about a chip."""
        flops = {"bfloat16": chip.flops, "FP8": chip.flops_fp8, "int8": chip.flops_int8}
        return cls(chip.memory, chip.bandwidth, flops, chip.links, chip.source)


@dataclass(frozen=True)
class Phase:
    """A decode step, or the processing of all prompts; what one device does in it.

    Attributes:
        tokens: how many tokens that yields or processes, on all devices together.
        flops, nbytes, sent: operations, bytes that it reads, and bytes that it sends to other devices.
    """

    tokens: int
    flops: float
    nbytes: float
    sent: float

    def times(self, limits: Limits) -> dict[str, float]:
        """The seconds that each of three limits takes at least; empty if they are not known."""
        if limits.bandwidth is None or limits.links is None:
            return {}
        return {
            "compute": self.flops / limits.flops["bfloat16"],
            "memory": self.nbytes / limits.bandwidth,
            "links": self.sent / limits.links,
        }

    def bound(self, limits: Limits) -> float | None:
        """The most tokens per second within `limits`, if everything overlaps perfectly; None: they are not known."""
        times = self.times(limits)
        return self.tokens / max(times.values()) if times else None

    def binds(self, limits: Limits) -> str | None:
        """Which of the limits decides the bound: "compute", "memory" or "links"; None: they are not known."""
        times = self.times(limits)
        return max(times, key=lambda name: times[name]) if times else None


@dataclass(frozen=True)
class Kind:
    """Layers that are alike.

    Attributes:
        count, first: how many there are, and the number of the first.
        weights, cache: bytes of each on one device.
        collectives: of each in a decode step.
    """

    count: int
    first: int
    weights: int
    cache: int
    collectives: tuple[Collective, ...]


@dataclass(frozen=True)
class Ranked:
    """A mesh of a search.

    Attributes:
        held: bytes of weights and cache on one device, and of temporaries if it was compiled.
        fits: whether they fit.
        bound: the bound on decoding, tokens per second; without the links' part unless it was compiled.
    """

    mesh: str
    held: int
    fits: bool
    bound: float | None
    compiled: bool


@dataclass(frozen=True)
class Plan:
    """What a model needs on a mesh, and what bounds its speed. Prints as text; a notebook shows a picture too.

    Weight bytes are those of the formats, temporaries are the compiler's (`memory_analysis`), collectives are read from
    the compiled programs, and operations and bytes a step are counted from shapes (`planning.costs`).

    Attributes:
        model, topology, mesh: what was planned, as text.
        devices: how many there are.
        batch, context: sequences, and tokens of each.
        dtype: of the activations.
        weights: bytes on one device by format.
        cache: bytes of keys and values on one device.
        temporaries: bytes that the programs need beside these, by program; of one layer of each kind. (Of all layers it
            is a little more: 33 MiB for Llama 3.1 8B on 8 x H100.)
        kinds: the layers by kind; `ends`: the collectives of a decode step before and after the layers.
        decode, prefill: a decode step with the context full, and the processing of prompts that fill it.
        limits: what one device cannot pass.
        ranking: the meshes of a search, the best first.
        advice: what would fit if this does not.
    """

    model: str
    topology: str
    mesh: str
    devices: int
    batch: int
    context: int
    dtype: str
    weights: Mapping[str, int]
    cache: int
    temporaries: Mapping[str, int]
    kinds: tuple[Kind, ...]
    ends: tuple[Collective, ...]
    decode: Phase
    prefill: Phase
    limits: Limits
    ranking: tuple[Ranked, ...] = ()
    advice: str = ""

    @property
    def total(self) -> int:
        """Bytes on one device at the worst moment."""
        return sum(self.weights.values()) + self.cache + max(self.temporaries.values())

    @property
    def fits(self) -> bool:
        """Whether a device has room for all of it."""
        return self.total <= self.limits.memory

    @property
    def verdict(self) -> str:
        """Whether it fits and by how much, and what would fit if not, in a sentence."""
        room = (self.limits.memory - self.total) / GIB
        said = f"fits, {room:.2f} GiB a device to spare" if self.fits else f"does not fit, by {-room:.2f} GiB a device"
        return f"{said}: {self.advice}" if self.advice else said

    def on(self, chip: str) -> Self:
        """The same plan within the published limits of as many other chips, for which no compiler is needed.

        Weights, cache, operations and bytes are counted from shapes, so they stay the same. Temporaries and collectives
        are still those of the compiler that made this plan.

        Raises:
            InputError: nothing is known of such a chip.
        """
        if chip not in CHIPS:
            raise InputError(f"chip '{chip}': known are {', '.join(CHIPS)}")
        limits = Limits.of(CHIPS[chip])
        return dataclasses.replace(self, topology=f"{chip}:{self.devices}", limits=limits, ranking=(), advice="")

    def json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`: bytes and seconds as numbers."""
        found = dataclasses.asdict(self)
        for name, phase in (("decode", self.decode), ("prefill", self.prefill)):
            found[name] |= {
                "seconds_at_least": phase.times(self.limits),
                "tokens_per_second_bound": phase.bound(self.limits),
                "binds": phase.binds(self.limits),
            }
        return found | {"total": self.total, "fits": self.fits, "verdict": self.verdict}

    def __str__(self) -> str:
        return "\n".join(itertools.chain(self._heading(), *(["", text] for text in self._tables("simple"))))

    def _repr_html_(self) -> str:
        """The same with bars of the memory, and a roofline."""
        heading = "".join(f"<p>{html.escape(line)}</p>" for line in self._heading())
        bars = picture.memory_bars(
            {**self.weights, "cache": self.cache, "temporaries": max(self.temporaries.values())}, self.limits.memory
        )
        roof = ""
        if self.limits.bandwidth is not None:
            phases = {"decode": self.decode, "prefill": self.prefill}
            points = {name: phase.flops / phase.nbytes for name, phase in phases.items()}
            roof = picture.roofline(points, self.limits.bandwidth, self.limits.flops)
        tables = "".join(self._tables("html"))
        return heading + bars + roof + tables

    def _heading(self) -> list[str]:
        return [
            f"{self.model} on {self.topology} as {self.mesh}: {self.verdict}",
            f"batch {self.batch}, context {self.context}, activations in {self.dtype}; compiled from shapes, not run",
        ]

    def _tables(self, style: str) -> Iterable[str]:
        yield table(self._memory(), ("on each device", "GiB"), style)
        headers = "layers", "each: weights", "cache", "collectives of a decode step"
        yield table(self._communication(), headers, style)
        yield table(self._speed(), ("", "decode step", "prompts"), style)
        if self.ranking:
            rows = [(r.mesh, _gib(r.held), "yes" if r.fits else "no", _rate(r.bound), r.compiled) for r in self.ranking]
            shown = [(*row[:4], "yes" if row[4] else "no: without temporaries and links") for row in rows]
            yield table(shown, ("mesh", "GiB a device", "fits", "decode bound, tokens/s", "compiled"), style)

    def _memory(self) -> list[tuple[str, str]]:
        rows = [(f"weights in {format}", _gib(nbytes)) for format, nbytes in self.weights.items()]
        rows.append(("cache", _gib(self.cache)))
        rows += [(f"temporaries of {name}", _gib(nbytes)) for name, nbytes in self.temporaries.items()]
        return [*rows, ("in all", _gib(self.total)), ("the device has", _gib(self.limits.memory))]

    def _communication(self) -> list[tuple[str, str, str, str]]:
        rows = [
            (
                f"{kind.count} like layer {kind.first}",
                _si(kind.weights, "B"),
                _si(kind.cache, "B"),
                _listed(kind.collectives),
            )
            for kind in self.kinds
        ]
        return [*rows, ("both ends", "", "", _listed(self.ends))]

    def _speed(self) -> list[tuple[str, str, str]]:
        phases = self.decode, self.prefill

        def row(name: str, *texts: str) -> tuple[str, str, str]:
            return name, texts[0], texts[1]

        rows = [
            row("tokens", *(str(phase.tokens) for phase in phases)),
            row("operations a device", *(_si(phase.flops, "FLOP") for phase in phases)),
            row("bytes read a device", *(_si(phase.nbytes, "B") for phase in phases)),
            row("bytes sent a device", *(_si(phase.sent, "B") for phase in phases)),
            row("operations a token", *(_si(phase.flops * self.devices / phase.tokens, "FLOP") for phase in phases)),
            row("bytes read a token", *(_si(phase.nbytes * self.devices / phase.tokens, "B") for phase in phases)),
        ]
        for name in self.decode.times(self.limits):
            times = (phase.times(self.limits)[name] for phase in phases)
            rows.append(row(f"seconds at least, {name}", *(f"{time:.3g}" for time in times)))
        if self.limits.bandwidth is not None:
            bounds = (f"{_rate(phase.bound(self.limits))} ({phase.binds(self.limits)} binds)" for phase in phases)
            rows.append(row("tokens/s at most: a bound, not a measurement", *bounds))
        return [*rows, row("limits from", self.limits.source, "")]


def _listed(collectives: Iterable[Collective]) -> str:
    """For example "2 x all-reduce of 229 kB over tp"."""
    counted = Counter((c.kind, c.nbytes, " and ".join(c.axes)) for c in collectives)
    return ", ".join(
        f"{count} x {kind} of {_si(nbytes, 'B')} over {axes}" for (kind, nbytes, axes), count in counted.items()
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f}"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _si(number: float, unit: str) -> str:
    size, prefix = next(((size, prefix) for size, prefix in PREFIXES if number >= size), (1.0, ""))
    return f"{number / size:.3g} {prefix}{unit}"
