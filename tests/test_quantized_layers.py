"""Every prequantized format in every place of a model, on 1, 2, 4 and 8 devices.

`linears` and `stacks` are the case table: they write matrices in a format, read them as a checkpoint's, cut them over a
mesh and multiply. What comes out is compared with float64 products of the matrices that tests/quantized_writers.py
says the tensors stand for. tests/reference/format_table.py prints the table of docs/formats.md from the same functions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled import dequantized
from covering import in_turn, some, widest_and_in_turn
from flax import nnx
from quantized_writers import CONFIGS, FORMATS, WRITERS

from jaxllm import parallel
from jaxllm.checkpoint.declared import declared
from jaxllm.checkpoint.matching import match
from jaxllm.checkpoint.quantized import join, with_activations
from jaxllm.formats.base import Weight, padded_index
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels.experts import Gated, gather_forward
from jaxllm.layers.experts import Experts
from jaxllm.layers.mlp import swiglu
from jaxllm.layers.parameter import Declaration, parameters
from jaxllm.models.names import expert_rules
from jaxllm.parallel import COLUMN, EXPERT_COLUMN, EXPERT_ROW, REPLICATED, ROW, make_mesh
from jaxllm.placing import Source, place

TOKENS, CHOICES, EXPERTS, VOCAB = 3, 2, 8, 96
IDS = np.array([[0, 95, 13], [50, 1, 64]], np.int32)
LINEAR_MESHES = ("tp=1", "tp=2", "tp=4", "tp=8")
EXPERT_MESHES = ("tp=1", "tp=2", "tp=2,ep=3", "tp=2,ep=4")  # 8 experts over 3 groups are 9
SPECS = {"matmul": REPLICATED, "column": COLUMN, "row": ROW, "awkward row": ROW, "padded row": ROW}
LINEAR_KINDS = (*SPECS, "decode", "lookup")
EXPERT_KINDS = ("experts", "gather_forward")

# Schemes that read tensors of a whole stack as well as those of single experts.
STACKABLE = [name for name in FORMATS if name.startswith(("mlx", "mxfp4", "fp8-block"))]
FEW_STACKED = ["mlx-3", "mlx-nvfp4", "mxfp4", "fp8-block"]  # of each class one


@dataclass(frozen=True)
class Kind:
    """A format, and sizes that it can have.

    make: a weight as read from a checkpoint, given its shape and a seed, and the float32 matrix that it stands for.
    hidden: rows of the wide matrices, columns of the others.
    fits: whole groups on every device. awkward: parts of a group. odd: padded up to `padded`.
    """

    make: Callable[[tuple[int, int], int], tuple[Weight, np.ndarray]]
    hidden: int = 64
    fits: int = 512
    awkward: int = 192  # 24 on each of 8 devices
    odd: int = 224
    padded: int = 256
    inner: int = 96  # of the experts


def tensors_of(name, shape, seed, module="m"):
    """The tensors of one layer as a checkpoint has them, and the matrix."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
    written = WRITERS[name](w, rng)
    return {f"{module}.{suffix}": Dense(x) for suffix, x in written.tensors.items()}, written.dequantized


def read(name, tensors):
    [weight] = with_activations(join(tensors, declared(CONFIGS[name], {})), "dequant").values()
    return weight


@cache
def made(name, shape, seed):
    tensors, dequantized = tensors_of(name, shape, seed)
    return read(name, tensors), dequantized


KINDS = {name: Kind(partial(made, name)) for name in FORMATS}


# ---- the case table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What came out, what should have, and the magnitudes of what was summed (None: every bit has to be the same)."""

    got: np.ndarray
    expected: np.ndarray
    scale: np.ndarray | None

    def check(self, kind, tolerance=1e-5):
        assert self.got.shape == self.expected.shape
        if self.scale is None:
            np.testing.assert_array_equal(self.got, self.expected, kind)
        else:
            assert np.isfinite(self.got).all()
            error = np.abs(self.got - self.expected) / self.scale
            assert error.max() < tolerance, (
                f"{kind}: wrong by {error.max():.2g} of what was summed, {error.mean():.2g} on average"
            )


def placed_linears(kind: Kind, mesh) -> tuple[dict[str, Weight], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A placed matrix for each place in a model, what each stands for, and where the columns of some stand."""
    tp, made = mesh.shape["tp"], {}
    for seed, (place_, shape) in enumerate(
        {
            "matmul": (kind.hidden, kind.awkward),
            "column": (kind.awkward, kind.hidden),
            "row": (kind.hidden, kind.fits),
            "awkward row": (kind.hidden, kind.awkward),
            "padded row": (kind.hidden, kind.odd),
            "lookup": (VOCAB, kind.hidden),
        }.items()
    ):
        made[place_] = kind.make(shape, seed)
    # As in MLP: rows of what comes before are padded as the columns of what comes after.
    places = padded_index(kind.awkward, made["awkward row"][0].granularity("in") * tp)
    rows = {"column": places, "lookup": padded_index(VOCAB, tp)}
    cols = {name: padded_index(w.shape[1], w.granularity("in") * tp) for name, (w, _) in made.items() if "row" in name}
    cols["padded row"] = padded_index(kind.odd, kind.padded)
    weights = {}
    for name, (weight, _) in made.items():
        spec = SPECS.get(name, COLUMN)
        declaration = Declaration(weight.shape, spec, rows.get(name), cols.get(name))
        weights[name] = place(Source(name, (weight,)), declaration, mesh)
    return weights, {name: w for name, (_, w) in made.items()}, cols


@jax.jit
def run_linears(weights, xs):
    out = {name: parallel.linear(xs[name], weights[name], spec) for name, spec in SPECS.items()}
    out["decode"] = weights["column"].dequantize()
    out["lookup"] = parallel.lookup(IDS, weights["lookup"], jnp.float32)
    return out


def linears(kind: Kind, mesh_name: str) -> dict[str, Case]:
    """Every kind of matmul, the decoded matrix, and the lookup, on one mesh."""
    mesh, rng = make_mesh(mesh_name), np.random.default_rng(7)
    weights, matrices, cols = placed_linears(kind, mesh)
    xs, inputs = {}, {}
    for name in SPECS:
        x = inputs[name] = rng.normal(size=(TOKENS, matrices[name].shape[1])).astype(np.float32)
        if name in cols:  # padded places: zeros, then the same with ones
            x = np.concatenate([np.where(cols[name] < 0, np.float32(fill), x[:, cols[name]]) for fill in (0, 1)])
        xs[name] = x
    with jax.set_mesh(mesh):
        got = jax.tree.map(np.asarray, run_linears(weights, xs))
    cases = {}
    for name, x in inputs.items():
        y, scale = (f(x).astype(np.float64) @ f(matrices[name]).T.astype(np.float64) for f in (np.asarray, np.abs))
        if name in cols:
            y, scale = np.concatenate([y, y]), np.concatenate([scale, scale])
        assert not got[name][:, y.shape[1] :].any()  # the padded rows are zeros
        cases[name] = Case(got[name][:, : y.shape[1]], y, scale)
    matrix = matrices["column"]
    rows = weights["column"].shape[0]
    cases["decode"] = Case(got["decode"], np.pad(matrix, ((0, rows - len(matrix)), (0, 0))), None)
    cases["lookup"] = Case(got["lookup"], matrices["lookup"][IDS], None)
    return cases


def stack_of(kind: Kind) -> tuple[dict[str, tuple[Weight, ...]], dict[str, np.ndarray]]:
    """Gate, up and down of each expert, and the three stacks of matrices."""
    wide, narrow = (kind.inner, kind.hidden), (kind.hidden, kind.inner)
    shapes = {"gate": wide, "up": wide, "down": narrow}
    made = {
        name: [kind.make(shape, 100 * (i + 1) + e) for e in range(EXPERTS)]
        for i, (name, shape) in enumerate(shapes.items())
    }
    parts = {name: tuple(weight for weight, _ in pairs) for name, pairs in made.items()}
    return parts, {name: np.stack([w for _, w in pairs]) for name, pairs in made.items()}


def placed_stack(kind: Kind, mesh, sources: dict[str, Source]) -> Gated:
    """As in `layers.experts`: padded to whole blocks and as many experts on every device."""
    places = padded_index(kind.inner, sources["down"].parts[0].granularity("in") * mesh.shape["tp"])
    cuts = dict.fromkeys(("gate", "up"), (EXPERT_COLUMN, places, None)) | {"down": (EXPERT_ROW, None, places)}
    stack = padded_index(EXPERTS, mesh.shape["ep"])
    return Gated(
        *(place(sources[n], Declaration(sources[n].shape, *cut, stack=stack), mesh) for n, cut in cuts.items())
    )


# Optimizing these loops takes longer than running them.
@partial(jax.jit, static_argnames="gathers", compiler_options={"xla_backend_optimization_level": 0})
def run_stack(stack, x, scores, chosen, gathers):
    out = {"experts": parallel.experts(x, scores, chosen, stack, EXPERTS, swiglu)}
    if gathers:
        out["gather_forward"] = gather_forward(x, stack.gate, chosen)
    return out


def stacks(kind: Kind, mesh_name: str, sources: dict[str, Source] | None = None) -> dict[str, Case]:
    """Experts on one mesh, and on one device each token times the matrices it has chosen."""
    mesh, rng = make_mesh(mesh_name), np.random.default_rng(8)
    parts, matrices = stack_of(kind)
    sources = sources or {name: Source(name, weights, stacked=True) for name, weights in parts.items()}
    stack = placed_stack(kind, mesh, sources)
    x = rng.normal(size=(TOKENS, kind.hidden)).astype(np.float32)
    scores = rng.uniform(0.5, 1.5, (TOKENS, CHOICES)).astype(np.float32)
    chosen = np.array([[0, 7], [5, 3], [7, 2]], np.int32)
    with jax.set_mesh(mesh):
        got = jax.tree.map(np.asarray, run_stack(stack, x, scores, chosen, gathers=mesh.size == 1))
    gate, up, down = (m.astype(np.float64)[chosen] for m in matrices.values())
    g, u = (np.einsum("tkoi,ti->tko", m, x) for m in (gate, up))
    h = g / (1 + np.exp(-g)) * u
    y = np.einsum("tkoi,tki,tk->to", down, h, scores)
    size = np.einsum("tkoi,tki,tk->to", np.abs(down), np.abs(h) + 1e-2, scores)
    cases = {"experts": Case(got["experts"], y, size)}
    if "gather_forward" in got:
        cases["gather_forward"] = Case(got["gather_forward"], g, np.einsum("tkoi,ti->tko", np.abs(gate), np.abs(x)))
    return cases


# One of each kind.
FEW = ["gptq-4", "gptq-act-order", "awq", "bnb-nf4", "bnb-int8", "mlx-4", "hqq-4-axis0", "hqq-3", "fp8-block"]
FEW += ["fp8-channel", "nvfp4-modelopt", "mxfp4"]
LINEAR_CASES = [*in_turn(FORMATS, LINEAR_MESHES[-1]), *in_turn(some([*FORMATS], FEW[::2]), *LINEAR_MESHES[:-1])]


@pytest.mark.parametrize(("name", "mesh"), LINEAR_CASES)
def test_a_matrix_multiplies_as_the_one_it_stands_for(name, mesh):
    cases = linears(KINDS[name], mesh)
    assert set(cases) == set(LINEAR_KINDS)
    for kind, case in cases.items():
        case.check(kind)


# On one device, tokens are also multiplied by what they gather of the stack.
EXPERT_CASES = some(
    widest_and_in_turn(FORMATS, *EXPERT_MESHES),
    [*in_turn(FEW, EXPERT_MESHES[-1]), *in_turn(FEW[1::2], "tp=1", "tp=2", "tp=1", "tp=2,ep=3")],
)


@pytest.mark.parametrize(("name", "mesh"), EXPERT_CASES)
def test_experts_multiply_as_those_they_stand_for(name, mesh):
    for kind, case in stacks(KINDS[name], mesh).items():
        case.check(kind)


@pytest.mark.parametrize(("name", "mesh"), widest_and_in_turn(some(STACKABLE, FEW_STACKED), *EXPERT_MESHES))
def test_a_stack_in_one_tensor_multiplies_as_the_experts_one_by_one(name, mesh):
    kind, sources = KINDS[name], {}
    for i, (part, shape) in enumerate({"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items()):
        each = [tensors_of(name, shape, 100 * (i + 1) + e)[0] for e in range(EXPERTS)]
        whole = {key: Dense(np.stack([tensors[key].values for tensors in each])) for key in each[0]}
        sources[part] = Source(part, (read(name, whole),))
        assert sources[part].shape == (EXPERTS, *shape)
    for name, case in stacks(kind, mesh, sources).items():
        case.check(name)


# ---- what lies where -----------------------------------------------------------------------------------------------

# Codes that are cut where their groups lie across: every device holds the scales of all groups.
WHOLE_SCALES = {("gptq-act-order", "row"), ("gptq-act-order", "awkward row")}
WHOLE_SCALES |= {(name, "column") for name in ("hqq-4-axis0", "hqq-3-axis0")}


def codes_of(weight):
    return getattr(weight, next(iter(weight.axes)))


@pytest.mark.parametrize(("name", "tp"), widest_and_in_turn(FORMATS, 2, 4, 8))
def test_every_device_holds_its_share(name, tp):
    """No leaf that runs along what is cut is whole on a device, and all leaves together are about 1/tp."""
    weights, _, _ = placed_linears(KINDS[name], make_mesh(f"tp={tp}"))
    for where, dim, shape in (("column", "out", (192, 64)), ("row", "in", (64, 512)), ("awkward row", "in", (64, 192))):
        weight = weights[where]
        for leaf_name, axes in weight.axes.items():
            leaf = getattr(weight, leaf_name)
            assert len(leaf.addressable_shards) == tp
            parts = tp if any(cut and cut.dim == dim for cut in axes) else 1
            assert {shard.data.nbytes * parts for shard in leaf.addressable_shards} == {leaf.nbytes}, leaf_name
        codes = codes_of(weight)
        assert codes.addressable_shards[0].data.nbytes * tp == codes.nbytes
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(weight))
        source = KINDS[name].make(shape, 0)[0]
        share = held / (source.bits_per_weight / 8 * np.prod(weight.shape))  # of the padded matrix
        # Groups that are cut repeat their scales: at 24 columns a device, those of 64 become groups of 8.
        assert share < (0.8 if (name, where) in WHOLE_SCALES else 1 / tp + 0.2), (where, share)


def nominal_bits(name):
    digit = re.search(r"(?:gptq|mlx|hqq|pack)-(\d)", name)
    return int(digit[1]) if digit else 8 if "8" in name else 4


@pytest.mark.parametrize("name", FORMATS)
def test_bits_per_weight_are_those_of_the_leaves(name):
    weight, matrix = made(name, (64, 192), 0)
    placed = place(Source(name, (weight,)), Declaration((64, 192), REPLICATED), make_mesh("tp=1"))
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(placed))
    assert weight.bits_per_weight == placed.bits_per_weight == 8 * held / matrix.size
    assert 8 * np.asarray(codes_of(placed)).nbytes == nominal_bits(name) * matrix.size
    stored = sum(t.values.nbytes for t in tensors_of(name, (64, 192), 0)[0].values())
    assert held < 1.2 * stored  # nothing is decoded


# ---- fused matrices ------------------------------------------------------------------------------------------------

BLOCK, LAYER = (16, 32), "model.layers.0.mlp."
# Hidden and intermediate size. The first two have stacks that are square, which do not say how they are stored; and of
# the last, gate and up, 80 columns, are blocks of 32, 32 and 16: one lies across.
SIZES = {"down is square": (40, 40), "gate and up are square": (80, 40), "none is square": (48, 40)}


class Mixture(nnx.Module):
    """A layer's experts as a model has them, which rules fill."""

    def __init__(self, hidden: int, inner: int, *multiples: int) -> None:
        self.config = None
        self.layers = nnx.List([nnx.Dict(mlp=nnx.Dict(experts=Experts(EXPERTS, hidden, inner, *multiples)))])


def fp8_stack(rng, *shape):
    """float8 `[experts, a, b]` with scales for blocks, and what they stand for."""
    values = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    grid = [-(-n // b) for n, b in zip(shape[1:], BLOCK, strict=True)]
    scales = rng.uniform(0.5, 2, (shape[0], *grid)).astype(np.float32)
    wide = scales.repeat(BLOCK[0], 1)[:, : shape[1]].repeat(BLOCK[1], 2)[..., : shape[2]]
    return values, scales, values.astype(np.float32) * wide


@pytest.mark.parametrize("transposed", [True, False], ids=["in-out", "out-in"])
@pytest.mark.parametrize(
    ("mesh_name", "sizes", "suffix"),
    [
        *((mesh, "none is square", "_scale_inv") for mesh in EXPERT_MESHES),
        (EXPERT_MESHES[-1], "down is square", ".weight_scale_inv"),
        (EXPERT_MESHES[-1], "gate and up are square", "_scale_inv"),
    ],
)
def test_stacks_of_fp8_experts_in_either_orientation(mesh_name, sizes, suffix, transposed):
    """FP8 experts in one tensor, `[experts, in, 2 * out]` or `[experts, 2 * out, in]`."""
    rng, mesh, (hidden, inner) = np.random.default_rng(0), make_mesh(mesh_name), SIZES[sizes]
    both, down = (EXPERTS, hidden, 2 * inner), (EXPERTS, inner, hidden)
    tensors, matrices = {}, {}
    for name, (e, a, b) in {"gate_up_proj": both, "down_proj": down}.items():
        values, scales, matrices[name] = fp8_stack(rng, *((e, a, b) if transposed else (e, b, a)))
        tensors |= {f"{LAYER}experts.{name}": Dense(values), f"{LAYER}experts.{name}{suffix}": Dense(scales)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}
    joined = join(tensors, declared(config, {}))
    model = Mixture(hidden, inner, 4 * mesh.shape["tp"], mesh.shape["ep"])
    rules, placed = expert_rules(r"model\.layers\.(\d+)\.mlp\.", hidden, inner, joined), {}
    for name, source in match(model, joined, rules).items():
        placed[name] = place(source, parameters(model)[name].get_value(), mesh)
    gate_up, down = (m.swapaxes(1, 2) if transposed else m for m in matrices.values())
    expected = {"gate_proj": gate_up[:, :inner], "up_proj": gate_up[:, inner:], "down_proj": down}
    for name, matrix in expected.items():
        weight = placed[f"layers.0.mlp.experts.{name}"]
        zeros = -EXPERTS % mesh.shape["ep"]
        assert isinstance(weight, Scaled) and weight.shape == (EXPERTS + zeros, *matrix.shape[1:])
        np.testing.assert_array_equal(dequantized(weight), np.pad(matrix, ((0, zeros), (0, 0), (0, 0))))
        assert not weight.values.sharding.is_fully_replicated or mesh.size == 1


FUSED = {"gate_up_proj": [40, 40], "qkv_proj": [64, 32, 32]}
FUSED_CONFIG = {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
FP8_CONFIGS = {
    "fp8": {"quant_method": "fp8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
        },
    },
}


@pytest.mark.parametrize("spec", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("tool", FP8_CONFIGS)
@pytest.mark.parametrize("module", FUSED)
def test_a_fused_matrix_has_a_scale_for_each_of_its_parts(module, tool, spec):
    rng, sizes = np.random.default_rng(0), FUSED[module]
    values = rng.normal(size=(sum(sizes), 64)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, len(sizes)).astype(np.float32)
    tensors = {f"{module}.weight": Dense(values), f"{module}.weight_scale": Dense(scales)}
    [weight] = join(tensors, declared(FUSED_CONFIG | {"quantization_config": FP8_CONFIGS[tool]}, {})).values()
    placed = place(Source(module, (weight,)), Declaration(values.shape, spec), make_mesh("tp=8"))
    np.testing.assert_array_equal(dequantized(placed), values.astype(np.float32) * scales.repeat(sizes)[:, None])
