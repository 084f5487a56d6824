"""Which matrices are trained, and what their factors begin with."""

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.checkpoint.adapter_files import read_adapter
from jaxllm.checkpoint.adapting import Adapter, adapter
from jaxllm.checkpoint.filling import Placed
from jaxllm.errors import InputError
from jaxllm.finetuning.step import Factors, Place
from jaxllm.formats.adapted import LowRank
from jaxllm.language_model import LanguageModel

_MATRIX = re.compile(r".*\.(\w+_proj|kv_a_proj_with_mqa)\.weight")
_STACK = re.compile(r".*\.(experts\.\w+_proj)")


def begun(
    model: LanguageModel, rank: int, scale: float, targets: Sequence[str] | None, seed: int
) -> tuple[dict[str, Place], dict[str, Factors]]:
    """Factors that change nothing yet, as PEFT begins: b is zero, and a is drawn uniformly from +- 1 / sqrt(in).

    The draws depend on the seed and on the matrix's name alone, not on the mesh.

    Args:
        targets: see `Settings`.

    Raises:
        InputError: the model has no matrix with one of these names.
    """
    places, factors = {}, {}
    for name, placed in _chosen(model, targets).items():
        *batch, out, in_ = placed.declaration.shape
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        a = random.uniform(-1, 1, (*batch, rank, in_)) / np.sqrt(in_)
        places[name] = Place(placed.declaration, scale)
        factors[name] = Factors(a.astype(np.float32), np.zeros((*batch, out, rank), np.float32))
    return places, factors


def trainable(model: LanguageModel) -> dict[str, Placed]:
    """The parameters that can be trained: projections of attention and of feed-forward blocks, and stacks of them."""
    return {placed.name: placed for placed in model.placed if _target(placed)}


def _target(placed: Placed) -> str | None:
    """What `Settings.targets` calls a parameter; None if it cannot be trained."""
    dims = len(placed.declaration.shape)
    m = (_MATRIX if dims == 2 else _STACK).fullmatch(placed.name) if dims > 1 else None
    return m[1] if m else None


def _chosen(model: LanguageModel, targets: Sequence[str] | None) -> dict[str, Placed]:
    named: dict[str, list[Placed]] = {}
    for placed in trainable(model).values():
        named.setdefault(_target(placed) or "", []).append(placed)
    if unknown := [target for target in targets or () if target not in named]:
        raise InputError(f"targets '{unknown[0]}': {model.name} has {', '.join(sorted(named))}")
    wanted = [name for name in named if "." not in name] if targets is None else targets
    return {placed.name: placed for name in wanted for placed in named[name]}


def continued(model: LanguageModel, path: str) -> tuple[dict[str, Place], dict[str, Factors]]:
    """The factors of an adapter that is trained further.

    Raises:
        InputError: it cannot be read, is for another model, or changes what is not trained here.
    """
    declared = {placed.name: placed.declaration for placed in model.placed}
    read = adapter(read_adapter(path), model.config, declared)
    if more := [name for name in (*read.replaced, *read.changes) if name not in trainable(model)]:
        raise InputError(f"{read.where}: it changes {more[0]}, which is not trained here")
    places = {name: Place(declared[name], float(low.scale.flat[0])) for name, low in read.changes.items()}
    return places, {name: Factors(low.a, low.b) for name, low in read.changes.items()}


def as_adapter(name: str, places: Mapping[str, Place], factors: Mapping[str, Factors]) -> Adapter:
    """The factors, on the host, as an adapter that can be attached."""
    return Adapter(name, name, changes(places, factors), {})


def changes(places: Mapping[str, Place], factors: Mapping[str, Factors]) -> dict[str, LowRank]:
    """What the factors add to each parameter, on the host."""
    return {
        name: places[name].low_rank(Factors(np.asarray(each.a), np.asarray(each.b))) for name, each in factors.items()
    }
