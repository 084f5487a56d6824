"""What configurations of several families have in common."""

from jaxllm.entries import Entries
from jaxllm.errors import InputError

# The most that is believed of a file, so that a hostile one cannot keep a machine busy.
MANY = 2**14  # layers, heads, experts, dimensions of a head
POSITIONS = 2**31 - 1


def typed_windows(config: Entries, count: int, window: int) -> list[int | None]:
    """The sliding window of each of `count` layers, from `layer_types`."""
    types = config.get("layer_types", None, lambda v: isinstance(v, list) and len(v) == count, f"a list of {count}")
    if unknown := [entry for entry in types if entry not in ("full_attention", "sliding_attention")]:
        raise InputError(f"{config.where}: 'layer_types' with {unknown[0]!r} are not supported")
    return [window if entry == "sliding_attention" else None for entry in types]
