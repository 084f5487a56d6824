"""`plan`: whether a model fits on devices that need not be here, what it needs there, and what bounds its speed.

Every parameter is a shape with its sharding, laid out as `load` would. A step of the prompt's processing and a step of
decoding are compiled (never run) by the compiler of those devices. Layers of one kind have the same needs, so the
compiled model has one layer of each kind, whose needs are multiplied by the number of such layers.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import psutil
from flax import nnx
from jax.sharding import Mesh

from jaxllm.decoding import CHUNK, SMALLEST, SMALLEST_CACHE, bucket
from jaxllm.device_memory import device_bytes
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, shards
from jaxllm.layers.cache import KVCache, LayerCache
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.loading import Settings
from jaxllm.parallel import ROWS, TP, make_mesh, of_batch, parse_mesh
from jaxllm.planning import topologies
from jaxllm.planning.compiling import Collective, collectives_between, lower_step
from jaxllm.planning.costs import Cost, decode_cost, ends_cost, head_cost, prefill_cost
from jaxllm.planning.report import Kind, Limits, Phase, Plan, Ranked
from jaxllm.planning.shapes import Described, describe
from jaxllm.planning.topologies import Topology

CONTEXT = 4096
COMPILED = 3  # meshes of a search whose programs are compiled
SMALLER = "q8_0", "q4_k", "q2_k"  # types to propose where a model does not fit


def plan(
    model: str,
    topology: str,
    mesh: str | None = None,
    *,
    batch: int = 1,
    context: int | None = None,
    quantize: str | int | None = None,
    cache_dtype: str | None = None,
    search: bool = False,
) -> Plan:
    """Plan a model on devices that need not be here; see `Plan` for what comes of it.

    Args:
        model: a name in `jaxllm.PRESETS`, a file or directory as for `load`, or a hub id, of which config.json is read.
        topology: chips and their shape: "v5e:4x4", "v5p:8x8x16", "tpu7x:2x2x1", "h100:8", "b200:8" or "cpu:8".
        mesh: text such as "tp=8,ep=2"; by default the best one of a search.
        batch: sequences that are processed together.
        context: tokens of each, prompt and answer; by default 4096, or the model's own if that is less.
        quantize: a type such as "q4_k" that matrices are encoded in.
        cache_dtype: "int8" or "fp8", if keys and values are cached in 8 bits.
        search: whether to rank all meshes and plan the best one, instead of `mesh`.

    Raises:
        InputError: an argument cannot be used, or the compiler for the devices is not installed.
    """
    if batch < 1:
        raise InputError(f"batch {batch}: must be 1 or above")
    described = describe(model) if quantize is None else describe(model).quantized(quantize)
    longest = described.config.max_position_embeddings
    context = min(CONTEXT, longest) if context is None else context
    if not 1 <= context <= longest:
        raise InputError(f"context {context}: {described.name} has positions for 1 to {longest} tokens")
    devices = topologies.topology(topology)
    if search or mesh is None:
        return best(described, devices, batch, context, cache_dtype)
    if (size := math.prod(parse_mesh(mesh).values())) != (count := devices.devices.size):
        fits = " or ".join(meshes(count)[:3])
        raise InputError(f"mesh {mesh} has {size} devices, but {topology} has {count}: try {fits}")
    return Sketch.of(described, devices, mesh, batch, context, cache_dtype).planned()


def meshes(count: int) -> list[str]:
    """All meshes of `count` devices with one copy of the model."""
    return [f"tp={tp},ep={count // tp}" for tp in range(count, 0, -1) if count % tp == 0]


@dataclass(frozen=True)
class Sketch:
    """A model on a mesh, made of shapes: all that is known without compiling.

    rows, capacity: the sequences and positions that programs are made for: batch and context, rounded up as `decoding`
        rounds them.
    sizes: bytes of each parameter on one device, by dotted path.
    """

    described: Described
    topology: Topology
    mesh: Mesh
    mesh_text: str
    batch: int
    context: int
    cache_dtype: str | None
    settings: Settings
    model: Decoder
    sizes: dict[str, int]

    @classmethod
    def of(
        cls,
        described: Described,
        topology: Topology,
        mesh: str,
        batch: int,
        context: int,
        cache_dtype: str | None = None,
    ) -> "Sketch":
        """Raises InputError if the model cannot be placed on the mesh."""
        made = make_mesh(mesh, list(topology.devices.flat))
        settings = Settings.of(made, None, None, "packed", None, None, None, False, cache_dtype=cache_dtype)
        model, sizes = described.placed(made, settings.dtype)
        return cls(described, topology, made, mesh, batch, context, cache_dtype, settings, model, sizes)

    @property
    def rows(self) -> int:
        return bucket(self.batch, 1)

    @property
    def capacity(self) -> int:
        return bucket(self.context, SMALLEST_CACHE)

    @property
    def chunk(self) -> int:
        """How many tokens of each prompt are processed at once."""
        return min(bucket(self.context, SMALLEST), CHUNK)

    @cached_property
    def cache(self) -> KVCache:
        return self.model.cache(self.rows, self.capacity, self.settings.cache_dtype, self.mesh)

    def cache_of(self, layer: int) -> LayerCache:
        """The keys and values that a layer reads."""
        owners = [i for i, block in enumerate(self.model.layers) if block.cache_of is None]
        owner = self.model.layers[layer].cache_of
        slot = owners.index(layer if owner is None else owner)
        return self.cache.keys[slot], self.cache.values[slot]

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes on one device by format, the largest first."""
        found: Counter[str] = Counter()
        for name, param in parameters(self.model).items():
            value = param.get_value()
            found[value.format if isinstance(value, Weight) else "float32 vectors"] += self.sizes[name]
        return dict(found.most_common())

    @property
    def held(self) -> int:
        """Bytes of weights and cache on one device."""
        return sum(self.sizes.values()) + device_bytes(self.cache)

    @cached_property
    def kinds(self) -> list[list[int]]:
        """The numbers of the layers of each kind: those with the same structure, formats, shapes and shardings."""
        found: dict[tuple, list[int]] = {}
        for i, layer in enumerate(self.model.layers):
            graph, state = nnx.split(layer)
            leaves, tree = jax.tree.flatten(state)
            key = graph, tree, *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
            found.setdefault(key, []).append(i)
        return list(found.values())

    @cached_property
    def costs(self) -> tuple[Cost, Cost]:
        """What one device does in a decode step, and with all prompts."""
        tp, chunks = self.mesh.shape[TP], math.ceil(self.context / self.chunk)
        rows = self.rows // shards(of_batch(ROWS, self.rows, self.mesh)[0], self.mesh)  # of this device
        head = head_cost(self.model, rows)
        decode = head + ends_cost(self.model, rows)
        prefill = head + ends_cost(self.model, rows * self.context / chunks) * chunks
        for first, *others in self.kinds:
            layer, cache, count = self.model.layers[first], self.cache_of(first), 1 + len(others)
            decode += decode_cost(layer, cache, rows, self.context, tp) * count
            prefill += prefill_cost(layer, cache, rows, self.context, self.chunk, tp) * count
        return decode, prefill

    @property
    def limits(self) -> Limits:
        chip = self.topology.chip
        if chip is None:
            memory = psutil.virtual_memory().total / self.mesh.devices.size
            return Limits(memory, None, {}, None, "this machine's memory, in equal parts")
        return Limits.of(chip)

    def phases(self, sent: tuple[float, float] = (0.0, 0.0)) -> tuple[Phase, Phase]:
        """Decoding and prefill, given the bytes that a device sends in a decode step and for all prompts."""
        decode, prefill = (
            Phase(tokens, cost.flops, cost.nbytes, nbytes)
            for tokens, cost, nbytes in zip((self.batch, self.batch * self.context), self.costs, sent, strict=True)
        )
        return decode, prefill

    @cached_property
    def _chosen(self) -> list[int]:
        """A layer of each kind, and those whose caches these read."""
        return sorted({i for group in self.kinds for i in _with_owner(self.model, group[0])})

    def compiled(self, time: int) -> jax.stages.Compiled:
        """A step that adds `time` tokens to each sequence, of the model with one layer of each kind."""
        reduced, options = only(self.model, self._chosen), dict(self.topology.compiler_options)
        sizes = self.rows, time, self.capacity
        s, rounds = self.settings, self.settings.matmul == "int8_blocks"
        return lower_step(reduced, self.mesh, *sizes, s.dtype, rounds, s.cache_dtype).compile(options or None)

    def planned(self) -> Plan:
        """Compile it, and put everything together."""
        chosen = self._chosen
        steps = {"decode": self.compiled(1), "prefill": self.compiled(self.chunk)}
        found = {name: collectives_between(step.as_text() or "", self.mesh) for name, step in steps.items()}

        def of(phase: str, layer: int | None) -> list[Collective]:
            position = None if layer is None else chosen.index(layer)
            return [collective for collective in found[phase] if collective.layer == position]

        def sent(phase: str) -> float:
            parts = [(of(phase, None), 1), *((of(phase, group[0]), len(group)) for group in self.kinds)]
            return sum(count * sum(collective.sent for collective in part) for part, count in parts)

        kinds = [
            Kind(
                len(group),
                group[0],
                sum(size for name, size in self.sizes.items() if name.startswith(f"layers.{group[0]}.")),
                device_bytes(self.cache_of(group[0])) if self.model.layers[group[0]].cache_of is None else 0,
                tuple(of("decode", group[0])),
            )
            for group in self.kinds
        ]
        temporaries = {name: _temporaries(step) for name, step in steps.items()}
        decode, prefill = self.phases((sent("decode"), sent("prefill") * math.ceil(self.context / self.chunk)))
        made = Plan(
            model=self.described.name,
            topology=self.topology.name,
            mesh=self.mesh_text,
            devices=self.mesh.devices.size,
            batch=self.batch,
            context=self.context,
            dtype=self.settings.dtype,
            weights=self.weights,
            cache=device_bytes(self.cache),
            temporaries=temporaries,
            kinds=tuple(kinds),
            ends=tuple(of("decode", None)),
            decode=decode,
            prefill=prefill,
            limits=self.limits,
        )
        return made if made.fits else replace(made, advice=self._advice(made))

    def _advice(self, made: Plan) -> str:
        """What would fit instead, by its weights and cache and this plan's temporaries."""
        room = made.limits.memory - max(made.temporaries.values())
        for mesh in meshes(made.devices):
            if mesh != self.mesh_text and (other := self._otherwise(self.described, mesh)) and other.held <= room:
                return f"the mesh {mesh} would"
        for type in SMALLER:
            other = self._otherwise(self.described.quantized(type), self.mesh_text)
            if other and other.held <= room:
                return f"--quantize {type} would"
        count = math.ceil(made.total * made.devices / made.limits.memory)
        return f"it would take the memory of {count} such devices or more"

    def _otherwise(self, described: Described, mesh: str) -> "Sketch | None":
        try:
            return Sketch.of(described, self.topology, mesh, self.batch, self.context, self.cache_dtype)
        except InputError:  # not every mesh divides every model
            return None


def best(described: Described, topology: Topology, batch: int, context: int, cache_dtype: str | None = None) -> Plan:
    """The plan of the best mesh: of those that fit, the one with the highest bound on decoding."""
    sketches, refused = [], InputError(f"{topology.name} has no devices")
    for mesh in meshes(topology.devices.size):
        try:
            sketches.append(Sketch.of(described, topology, mesh, batch, context, cache_dtype))
        except InputError as error:  # not every mesh divides every model
            refused = error
    if not sketches:
        raise refused
    limits = sketches[0].limits
    sketches.sort(key=lambda s: _worth(s.held <= limits.memory, s.held, s.phases()[0], limits))
    compiled = [sketch.planned() for sketch in sketches[:COMPILED]]
    compiled.sort(key=lambda plan: _worth(plan.fits, plan.total, plan.decode, limits))
    ranking = [Ranked(p.mesh, p.total, p.fits, p.decode.bound(limits), True) for p in compiled]
    for s in sketches[COMPILED:]:
        ranking.append(Ranked(s.mesh_text, s.held, s.held <= limits.memory, s.phases()[0].bound(limits), False))
    return replace(compiled[0], ranking=tuple(ranking))


def _worth(fits: bool, held: int, decode: Phase, limits: Limits) -> tuple[bool, float, int]:
    """What a search sorts by: whether it fits, then the bound on decoding (or what it reads), then memory."""
    bound = decode.bound(limits)
    return not fits, decode.nbytes if bound is None else -bound, held


def _temporaries(step: jax.stages.Compiled) -> int:
    """Bytes that a program needs on a device beside its arguments, which the updated cache takes the place of."""
    memory = step.memory_analysis()
    assert memory is not None  # all compilers of ours say
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _with_owner(model: Decoder, layer: int) -> tuple[int, ...]:
    """A layer, and the one whose cache it reads."""
    owner = model.layers[layer].cache_of
    return (layer,) if owner is None else (owner, layer)


def only(model: Decoder, layers: list[int]) -> Decoder:
    """The model with some of its layers only, which share its parameters."""
    graph, state = nnx.split(model)
    reduced: Decoder = nnx.merge(graph, state)
    kept = [reduced.layers[i] for i in layers]
    for layer in kept:
        layer.cache_of = None if layer.cache_of is None else layers.index(layer.cache_of)
    reduced.layers = nnx.List(kept)
    return reduced
