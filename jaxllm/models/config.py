"""Helpers for the configurations of several families: sizes that depend on each other, and GGUF's own keys."""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight

# Upper limits for values in a file, so that a hostile file cannot keep a machine busy.
MANY = 2**14  # layers, heads, experts, dimensions of a head
WIDEST = 2**24  # all heads together
POSITIONS = 2**31 - 1

# The names of the entries for `routing`.
HF_ROUTING = "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"
GGUF_ROUTING = "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"


def gguf_entries(metadata: Mapping[str, object], architectures: Sequence[str]) -> tuple[str, Entries]:
    """The architecture of a GGUF file, and its metadata entries with the architecture's prefix, which is removed.

    Raises:
        InputError: the architecture is none of `architectures`.
    """
    arch = Entries(metadata, "metadata").choice("general.architecture", architectures)
    own = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    return arch, Entries(own, f"metadata {arch}.*")


def gguf_vocab_size(given: Entries, tensors: Mapping[str, Weight]) -> int:
    """The vocabulary size: few files have an entry for it, but the embedding table shows it."""
    table = tensors.get("token_embd.weight")
    return given.integer("vocab_size") if table is None else table.shape[0]


def layer_count(config: Entries, key: str, tensors: Collection[str]) -> int:
    """The number of layers. It cannot exceed the number of tensors, if these are known (`tensors` not empty)."""
    count = config.integer(key, most=MANY)
    if tensors and count > len(tensors):
        raise InputError(f"{config.where}: '{key}' is {count}, but there are {len(tensors)} tensors only")
    return count


def per_layer(config: Entries, key: str, count: int, default: object = None, least: int = 1) -> list[int]:
    """A whole number up to `WIDEST` for each of `count` layers, from a list or from one number for all layers."""

    def good(value: object) -> bool:
        return all(type(n) is int and least <= n <= WIDEST for n in (value if isinstance(value, list) else [value]))

    value = config.get(key, default, good, f"a whole number from {least} to {WIDEST}, or a list of them")
    if isinstance(value, list) and len(value) != count:
        raise InputError(f"{config.where}: '{key}' has {len(value)} values for {count} layers")
    return value if isinstance(value, list) else [value] * count


def check_shared(config: Entries, heads_key: str, heads: int, kv_key: str, kv_heads: int) -> None:
    """Raise InputError unless every key/value head serves the same number of query heads."""
    if heads % kv_heads:
        raise InputError(
            f"{config.where}: {heads} query heads cannot share {kv_heads} key/value heads evenly ('{heads_key}', "
            f"'{kv_key}')"
        )


def check_activation(config: Entries) -> None:
    """Raise InputError if a config.json asks for an activation other than SiLU."""
    if (activation := config.values.get("hidden_act")) not in (None, "silu", "swish"):
        raise InputError(f"{config.where}: hidden_act {reprlib.repr(activation)} is not supported, only silu")


def typed_windows(config: Entries, count: int, window: int) -> list[int | None]:
    """The sliding window of each of `count` layers, from `layer_types`."""
    types = config.get("layer_types", None, lambda v: isinstance(v, list) and len(v) == count, f"a list of {count}")
    if unknown := [entry for entry in types if entry not in ("full_attention", "sliding_attention")]:
        raise InputError(f"{config.where}: 'layer_types' with {reprlib.repr(unknown[0])} are not supported")
    return [window if entry == "sliding_attention" else None for entry in types]


def routing(
    config: Entries, experts: str, chosen: str, groups: str = "", limited: str = "", least: int = 1
) -> dict[str, Any]:
    """The numbers of experts and groups, in total and chosen, by Hugging Face's names; the arguments name the entries.

    Args:
        groups, limited: "" if the model does not choose groups.
        least: how many experts a group's score needs at least.
    """
    count = config.integer(experts, most=MANY)
    used = config.integer_up_to(chosen, count, experts)
    sizes = {"n_routed_experts": count, "num_experts_per_tok": used}
    if not groups:
        return sizes | {"n_group": 1, "topk_group": 1}
    number = config.integer_up_to(groups, count, experts, 1)
    kept = config.integer_up_to(limited, number, groups, 1)
    if count % number or (number > 1 and count // number < least):
        raise InputError(
            f"{config.where}: {count} experts ('{experts}') are not {number} equal groups ('{groups}') of {least} or "
            "more"
        )
    if used > kept * (count // number):
        raise InputError(
            f"{config.where}: '{chosen}' is {used}, more than the {kept * (count // number)} experts in {kept} "
            f"groups ('{limited}') of {number} ('{groups}')"
        )
    return sizes | {"n_group": number, "topk_group": kept}
