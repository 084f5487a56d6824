"""Joins tensors that make up one quantized weight, as the checkpoint's config declares."""

from collections.abc import Mapping
from dataclasses import replace

from jaxllm.checkpoint.declared import SIBLINGS, Declared, declared
from jaxllm.checkpoint.safetensors import HFDirectory, optional_json
from jaxllm.checkpoint.schemes import Scheme
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels.activations import not_rounding


def assemble(folder: HFDirectory) -> dict[str, Weight]:
    """The tensors of a directory; those of one quantized matrix are joined under the matrix's name.

    The tensors show which matrices are quantized, the config says how. A matrix that the config allows to be quantized
    but that is stored as plain numbers stays unchanged.

    Raises:
        InputError: the quantization is not supported, a matrix lacks a part or has parts that do not fit, or a matrix
            is quantized although the config excludes it.
    """
    found = declared(folder.config, {name: optional_json(folder.path, name).values for name in SIBLINGS})
    return dict(folder.tensors) if found is None else join(folder.tensors, found)


def only(*known: Scheme) -> Declared:
    """For `join`: every matrix may be in any of these schemes."""
    return Declared(lambda module: known, frozenset(scheme.key for scheme in known))


def join(tensors: Mapping[str, Dense], found: Declared) -> dict[str, Weight]:
    """The tensors; those that make up one quantized matrix are joined.

    Raises:
        InputError: lists every matrix that lacks a part, has parts that do not fit, or contradicts what is declared.
    """
    joined: dict[str, Weight] = {}
    used: set[str] = set()
    complaints: list[str] = []
    for name in tensors:
        known = _known(name, found)
        if not known:
            continue
        module, scheme = next((pair for pair in known if not _missing(*pair, tensors)), known[0])
        owner = (module + scheme.result).removesuffix(".weight")
        if (entry := found.excluded(owner)) is not None:
            complaints.append(f"'{owner}' is left out of the quantization by {entry!r}, but has '{name}'")
        elif missing := _missing(module, scheme, tensors):
            complaints.append(f"'{name}' is there, but '{missing[0]}' is missing ({scheme.name})")
        elif module + scheme.result in joined:
            complaints.append(f"'{module + scheme.result}' is there in two ways; one is '{name}'")
        else:
            parts = {**scheme.parts} | {
                k: part for k, part in scheme.optional.items() if module + part.suffix in tensors
            }
            used.update(module + suffix for suffix in (*(part.suffix for part in parts.values()), *scheme.unused))
            try:
                arrays = {k: part.check(tensors[module + part.suffix].values) for k, part in parts.items()}
                joined[module + scheme.result] = scheme.build(**arrays)
            except InputError as error:
                complaints.append(f"'{module + scheme.result}': {error}")
    for name, tensor in tensors.items():
        if name not in used:
            joined[name] = tensor
            complaints += _alone(name, tensor, found)
    if complaints:
        raise InputError("; ".join(complaints[:8]) + (f"; and {len(complaints) - 8} more" if complaints[8:] else ""))
    return joined


def _known(name: str, found: Declared) -> list[tuple[str, Scheme]]:
    """The modules and schemes that a tensor of this name would identify."""
    modules = ((key, name.removesuffix(key)) for key in sorted(found.keys) if name.endswith(key))
    return [(module, scheme) for key, module in modules for scheme in found.schemes(module) if scheme.key == key]


def _missing(module: str, scheme: Scheme, tensors: Mapping[str, Dense]) -> list[str]:
    return [module + part.suffix for part in scheme.parts.values() if module + part.suffix not in tensors]


def _alone(name: str, tensor: Weight, found: Declared) -> list[str]:
    """A complaint about a tensor that is useless without others."""
    if not isinstance(tensor, Dense) or not tensor.format.startswith("float8"):
        return []
    for scheme in found.schemes(name):
        values = scheme.parts.get("values")
        if values is not None and name.endswith(values.suffix):
            return [f"'{name}' is FP8, but '{name.removesuffix(values.suffix) + scheme.key}' is missing"]
    return [f"'{name}' is FP8, but its scales are missing"]


def with_activations(tensors: Mapping[str, Weight], kind: str) -> dict[str, Weight]:
    """The same tensors, but weights of `kind` require activations rounded to `kind`.

    For blockwise FP8, as many activations as a block is wide share a scale. Other weights use one scale per row, or the
    checkpoint's scale.

    Args:
        kind: "fp8", "int8", or another: then nothing is rounded here, whatever the checkpoint says.

    Raises:
        InputError: there are no such tensors.
    """
    dtype = {"fp8": "float8_e4m3fn", "int8": "int8"}.get(kind)

    def fits(w: Weight) -> bool:
        # For INT8 blocks, nothing says how activations should be rounded.
        return isinstance(w, Scaled) and w.values.dtype.name == dtype and (kind == "fp8" or w.block[1] is None)

    def rounding(w: Weight) -> Weight:
        if not isinstance(w, Scaled) or not fits(w):
            return not_rounding(w)
        return replace(w, activations=replace(w.activations or Activations(), group=w.block[1]))

    if dtype and not any(map(fits, tensors.values())):
        raise InputError(f"matmul '{kind}' needs a checkpoint with {kind.upper()} weights")
    return {name: rounding(w) for name, w in tensors.items()}
