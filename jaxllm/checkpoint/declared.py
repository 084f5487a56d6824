"""What a checkpoint's config declares about its quantization: the scheme of each module.

Every tool has its own entry (`quantization_config`, MLX's `quantization`, ModelOpt's `hf_quant_config.json`), its own
way to exclude modules, and its own way to give some of them other parameters.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxllm.checkpoint import fourbit_schemes, integer_schemes, scaled_schemes
from jaxllm.checkpoint.schemes import Scheme
from jaxllm.entries import Entries
from jaxllm.errors import InputError, located
from jaxllm.patterns import matches


@dataclass(frozen=True)
class Declared:
    """The declared quantization of a checkpoint.

    Attributes:
        schemes: given a module's name, the schemes that its matrix may be in.
        keys: the endings of tensor names by which matrices in these schemes are recognised.
        excluded: given a module's name, the entry of a list that excludes it, or None.
    """

    schemes: Callable[[str], Sequence[Scheme]]
    keys: frozenset[str]
    excluded: Callable[[str], str | None] = lambda module: None


SIBLINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # of ModelOpt, AutoGPTQ, AutoAWQ
NOT_CONVERTED = ("modules_to_not_convert", "ignored_layers")  # what configs of FP8 call the matrices that are not FP8


def declared(config: Mapping[str, object], siblings: Mapping[str, Mapping[str, object]]) -> Declared | None:
    """The declaration in config.json, or in a file beside it that older tools wrote instead; None if there is none.

    Args:
        siblings: those files of SIBLINGS that exist.

    Raises:
        InputError: the declaration makes no sense or is not supported.
    """
    for name in ("quantization_config", "quantization", "compression_config"):
        if given := config.get(name):
            break
    else:
        name, given = _sibling(siblings)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"{name} is {given!r}, expected an object")
    entries = Entries(given, name)
    method = entries.get("quant_method", "mlx", lambda value: isinstance(value, str), "text").lower()
    if method not in READERS:
        raise InputError(f"quantization '{method}' is not supported; supported: {', '.join(READERS)}")
    return READERS[method](entries, config)


def _sibling(siblings: Mapping[str, Mapping[str, object]]) -> tuple[str, object]:
    """The name of the first file that exists, and its content in today's form."""
    for name in SIBLINGS:
        if not (given := siblings.get(name)):
            continue
        if name == "hf_quant_config.json":
            inner = given.get("quantization")
            return name, {"quant_method": "modelopt", **inner} if isinstance(inner, Mapping) else inner
        if "w_bit" in given:
            return name, {
                "quant_method": "awq",
                "bits": given["w_bit"],
                "group_size": given.get("q_group_size"),
                **given,
            }
        return name, {"quant_method": "gptq", **given}
    return "", None


def _constant(*known: Scheme, excluded: Callable[[str], str | None] = lambda module: None) -> Declared:
    return Declared(lambda module: known, frozenset(scheme.key for scheme in known), excluded)


def _listed(entries: Entries, *names: str) -> list[str]:
    found = next((name for name in names if name in entries), None)
    if found is None:
        return []
    return entries.get(
        found, [], lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v), "a list of names"
    )


def _left_out(patterns: list[str]) -> Callable[[str], str | None]:
    """As in transformers, an entry is the beginning of a name, perhaps a regular expression, or its end."""

    def excluded(module: str) -> str | None:
        return next((p for p in patterns if _matches(p, module, r"(?:\.|$)") or module.endswith(p)), None)

    return excluded


def _matches(pattern: str, name: str, end: str = "") -> bool:
    with located("its quantization config"):
        return matches(pattern, name, f"(?:{{}}){end}")


def _bits(entries: Entries, *allowed: int, default: int | None = None) -> int:
    what = f"one of {', '.join(map(str, allowed))}"
    return entries.get("bits", default, lambda value: type(value) is int and value in allowed, what)


def _group(entries: Entries) -> int:
    good = "-1 or a number above 0"
    return entries.get("group_size", -1, lambda v: type(v) is int and (v == -1 or 0 < v < 2**24), good)


def _gptq(entries: Entries, config: Mapping[str, object]) -> Declared:
    form = entries.values.get("checkpoint_format") or entries.values.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise InputError(f"{entries.where}: GPTQ's '{form}' files are not supported, only gptq and gptq_v2; convert it")

    def scheme(given: Entries) -> Scheme:
        return integer_schemes.gptq(_bits(given, 2, 3, 4, 8), _group(given), form == "gptq_v2")

    usual = scheme(entries)
    dynamic = entries.get("dynamic", {}, lambda value: isinstance(value, Mapping), "an object")
    rules = []  # a regular expression, and the scheme of the modules it matches, or None to exclude them
    for pattern, value in dynamic.items():
        given = Entries(
            {**entries.values, **(value if isinstance(value, Mapping) else {})}, f"{entries.where}: {pattern}"
        )
        rules.append((pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, pattern[:2] != "-:" and scheme(given)))

    def first(module: str) -> tuple[str, Scheme | bool] | None:
        return next(((p, s) for p, s in rules if _matches(p, module)), None)

    def excluded(module: str) -> str | None:
        found = first(module)
        return found[0] if found and not found[1] else None

    def schemes(module: str) -> list[Scheme]:
        found = first(module)
        return [found[1] if found and isinstance(found[1], Scheme) else usual]

    return Declared(schemes, frozenset({usual.key}), excluded)


def _awq(entries: Entries, config: Mapping[str, object]) -> Declared:
    version = str(entries.values.get("version") or "gemm").lower()
    if version != "gemm":
        raise InputError(f"{entries.where}: AWQ's version '{version}' is not supported, only gemm")
    _bits(entries, 4, default=4)
    return _constant(
        integer_schemes.awq(_group(entries)), excluded=_left_out(_listed(entries, "modules_to_not_convert"))
    )


def _bitsandbytes(entries: Entries, config: Mapping[str, object]) -> Declared:
    # Each matrix shows which of the two it is.
    skipped = _left_out(_listed(entries, "llm_int8_skip_modules"))
    int8 = scaled_schemes.llm_int8(entries.number("llm_int8_threshold", 6.0, above=-1.0))
    return _constant(fourbit_schemes.BNB_4BIT, int8, excluded=skipped)


def _hqq(entries: Entries, config: Mapping[str, object]) -> Declared:
    return _constant(integer_schemes.HQQ, excluded=_left_out(_listed(entries, "skip_modules")))


def _fp8(entries: Entries, config: Mapping[str, object]) -> Declared:
    if (fmt := entries.values.get("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise InputError(f"{entries.where}: FP8 of the kind '{fmt}' is not supported, only e4m3")
    excluded = _left_out(_listed(entries, *NOT_CONVERTED))
    if "weight_block_size" in entries:
        block, ue8m0 = _block(entries, "weight_block_size"), scaled_schemes.is_ue8m0(entries)
        # The last one is for stacks, which have no ".weight".
        names = ("", "_scale_inv"), (".weight", ".weight_scale"), ("", ".weight_scale_inv")
        return _constant(*(scaled_schemes.block_fp8(block, *pair, ue8m0) for pair in names), excluded=excluded)
    return _constant(*_scaled("FP8", config), excluded=excluded)


def _scaled(name: str, config: Mapping[str, object]) -> tuple[Scheme, ...]:
    """Schemes for both names that a scale may have."""
    fused = _fused_rows(config)
    return tuple(scaled_schemes.scaled(name, suffix, fused) for suffix in (".weight_scale", ".weight_scale_inv"))


def _fused_rows(config: Mapping[str, object]) -> Callable[[int], list[int]]:
    """The numbers of rows of a fused matrix's parts: gate and up, or q, k and v."""
    given = Entries(config, "config.json")

    def parts(count: int) -> list[int]:
        if count == 2:
            return [given.integer("intermediate_size")] * 2
        heads = given.integer("num_attention_heads")
        dim = given.integer("head_dim", given.integer("hidden_size") // heads)
        kv = given.integer("num_key_value_heads", heads)
        return [heads * dim, kv * dim, kv * dim] if count == 3 else []

    return parts


def _block(entries: Entries, key: str) -> tuple[int, int]:
    what = "two numbers above 0"
    good = entries.get(
        key, None, lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and n > 0 for n in v), what
    )
    return tuple(good)


def _mxfp4(entries: Entries, config: Mapping[str, object]) -> Declared:
    # Its list of modules has patterns that match too much. So the tensors decide: what is packed is quantized.
    return _constant(fourbit_schemes.MXFP4_GPT_OSS, fourbit_schemes.MXFP4_PLAIN)


def _mlx(entries: Entries, config: Mapping[str, object]) -> Declared:
    def scheme(given: Entries) -> Scheme:
        mode = given.get("mode", "affine", lambda value: isinstance(value, str), "text")
        sizes = {
            "mxfp4": fourbit_schemes.MXFP4_MLX,
            "nvfp4": fourbit_schemes.NVFP4_MLX,
            "mxfp8": scaled_schemes.MXFP8_MLX,
        }
        if mode in sizes:
            return sizes[mode]
        if mode != "affine":
            raise InputError(f"{given.where}: MLX's mode '{mode}' is not supported")
        return integer_schemes.mlx(_bits(given, 1, 2, 3, 4, 5, 6, 8), given.integer("group_size"))

    usual = scheme(entries)
    # What an override leaves out has MLX's own default, not the other modules' value.
    others = {
        path: scheme(Entries({"group_size": 64, "bits": 4, **value}, f"{entries.where}: {path}"))
        for path, value in entries.values.items()
        if isinstance(value, Mapping)
    }
    out = {path for path, value in entries.values.items() if value is False}
    return Declared(
        lambda module: [others.get(module, usual)],
        frozenset({usual.key}),
        lambda module: module if module in out else None,
    )


def _compressed_tensors(entries: Entries, config: Mapping[str, object]) -> Declared:
    groups = entries.get("config_groups", None, lambda v: isinstance(v, Mapping) and bool(v), "an object of groups")
    known: list[tuple[list[str], Scheme]] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise InputError(f"{entries.where}: group '{name}' says nothing of weights")
        weights = Entries(group["weights"], f"{entries.where}: {name}.weights")
        form = group.get("format") or entries.values.get("format")
        targets = _listed(Entries(group, f"{entries.where}: {name}"), "targets")
        known.append((targets, _compressed(form, weights, config)))
    ignored = _listed(entries, "ignore")

    def of(module: str) -> list[Scheme]:
        """A name takes precedence over a regular expression, and that over a class such as "Linear"."""
        for strength in (
            lambda t: t == module,
            lambda t: _is_regex(t, module),
            lambda t: t[:1].isupper(),
        ):
            for targets, scheme in known:
                if any(strength(target) for target in targets):
                    return [scheme]
        return []

    def excluded(module: str) -> str | None:
        return next((entry for entry in ignored if entry == module or _is_regex(entry, module)), None)

    return Declared(of, frozenset(scheme.key for _, scheme in known), excluded)


def _is_regex(entry: str, module: str) -> bool:
    return entry.startswith("re:") and _matches(entry.removeprefix("re:"), module)


def _compressed(form: object, weights: Entries, config: Mapping[str, object]) -> Scheme:
    kind, strategy = weights.values.get("type") or "int", weights.values.get("strategy")
    if form == "nvfp4-pack-quantized":
        return fourbit_schemes.NVFP4_COMPRESSED
    if form == "mxfp4-pack-quantized":
        return fourbit_schemes.MXFP4_COMPRESSED
    if form == "mxfp8-quantized":
        return scaled_schemes.MXFP8
    bits = weights.integer("num_bits", most=8)
    if form == "pack-quantized":
        group = _group(weights)
        return integer_schemes.pack_quantized(bits, None if group == -1 else group)
    if form in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8:
        if strategy == "block":
            return scaled_schemes.block_fp8(_block(weights, "block_structure"), ".weight", ".weight_scale")
        if strategy in ("tensor", "channel"):
            return scaled_schemes.scaled("FP8" if kind == "float" else "INT8", fused=_fused_rows(config))
    raise InputError(f"{weights.where}: {bits}-bit {kind} by {strategy} in the format '{form}' is not supported")


def _modelopt(entries: Entries, config: Mapping[str, object]) -> Declared:
    block = scaled_schemes.block_fp8((128, 128), ".weight", ".weight_scale")
    known = {
        "FP8": scaled_schemes.scaled("FP8", fused=_fused_rows(config)),
        "FP8_PER_CHANNEL_PER_TOKEN": scaled_schemes.scaled("FP8", fused=_fused_rows(config)),
        "FP8_PB_WO": block,
        "NVFP4": fourbit_schemes.NVFP4_MODELOPT,
        "W4A16_NVFP4": fourbit_schemes.NVFP4_MODELOPT,
    }
    if "weight_block_size" in entries:
        known["FP8_PB_WO"] = scaled_schemes.block_fp8(_block(entries, "weight_block_size"), ".weight", ".weight_scale")

    def scheme(given: Entries) -> Scheme:
        return known[
            given.get("quant_algo", None, lambda v: isinstance(v, str) and v in known, f"one of {', '.join(known)}")
        ]

    patterns = _listed(entries, "ignore", "exclude_modules")

    def excluded(module: str) -> str | None:
        return next((p for p in patterns if fnmatch.fnmatchcase(module, p)), None)

    if "quant_algo" not in entries:  # only a cache is quantized, which ours is not
        return _constant()
    if entries.values["quant_algo"] != "MIXED_PRECISION":
        return _constant(scheme(entries), excluded=excluded)
    layers = entries.get("quantized_layers", None, lambda value: isinstance(value, Mapping), "an object")
    of = {
        module: [scheme(Entries(value, f"{entries.where}: {module}"))]
        for module, value in layers.items()
        if isinstance(value, Mapping)
    }
    return Declared(lambda module: of.get(module, []), frozenset(s.key for [s] in of.values()), excluded)


def _f8q8(entries: Entries, config: Mapping[str, object]) -> Declared:
    return _constant(scaled_schemes.F8Q8)


# By `quant_method`. To add one, write a reader and list it here, or set `READERS[name] = reader` from outside.
READERS: dict[str, Callable[[Entries, Mapping[str, object]], Declared]] = {
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "hqq": _hqq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "mlx": _mlx,
    "afq": _mlx,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "f8q8": _f8q8,
}
