"""Adapters of PEFT: adapter_config.json and adapter_model.safetensors.

The tensors themselves say what is adapted. The configuration says so too (`target_modules`, a list, a pattern or a
shorthand), but of the modules of a model in torch, which we do not have; here it is asked for scales alone, and which
parameters of a module its pairs are for.

The rules are those of peft 0.21: `tuners/lora/model.py` for scales, `ParamWrapper` in `tuners/lora/layer.py` for stacks
of experts, `utils/save_and_load.py` for names.
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.adapter_pairs import AdapterFile, Pairs, low_rank, not_plain, usable
from jaxllm.checkpoint.safetensors import read_header
from jaxllm.entries import Entries
from jaxllm.errors import InputError, located
from jaxllm.formats.adapted import LowRank
from jaxllm.models.family import HUGGING_FACE
from jaxllm.patterns import matches

TENSORS = "adapter_model.safetensors"

# Entries of the configuration that make an adapter more than `W + scale * b @ a`.
_BEYOND = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "Activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "Monteclora",
    "lora_bias": "LoRA with biases of its own",
    "layer_replication": "LoRA with repeated layers",
    "trainable_token_indices": "LoRA with trained tokens",
}
# How an adapter was initialised, where that changed the base as well.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parameters that a module's pairs may be for, in the order in which transformers' modules have them.
_PARAMETERS = ("weight", "gate_up_proj", "down_proj")

_PAIR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?\.weight")
_TABLE = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")


def read_peft(path: Path, config: Entries) -> AdapterFile:
    """The adapter in a directory whose adapter_config.json is `config`.

    Raises:
        InputError: it is damaged, incomplete, or more than plain LoRA.
    """
    scales, file = _Config.read(config), path / TENSORS
    if not file.exists() and (pickles := sorted(path.glob("*.bin"))):
        raise InputError(
            f"{path}: only a pickle ({pickles[0].name}), which can run code and is not read; use safetensors"
        )
    pairs, tables, replaced = Pairs[tuple[str, int]](), Pairs[str](), {}
    with located(file):
        for stored, array in read_header(file).items():
            name = stored.removeprefix("base_model.model.")
            if m := _PAIR.fullmatch(name):
                pairs.add((m[1], m[2].count(".")), m[3].lower(), name, array)
            elif m := _TABLE.fullmatch(name):
                # The table is [vocabulary, hidden], and for PEFT changes by the transpose of B @ A.
                tables.add(m[1], {"A": "b", "B": "a"}[m[2]], name, array)
            elif ".lora_" in name:
                raise not_plain(name)
            elif not name.endswith(".base_layer.weight"):  # an adapted table of the base, saved unchanged beside it
                usable(name, array)
                replaced[name.replace(".base_layer", "")] = np.asarray(array)
        changes = dict(scales.change(module, depth, a, b) for (module, depth), a, b in pairs.complete())
        for module, a, b in tables.complete():
            name = module + ".weight"
            changes[name] = low_rank(name, a.T, b.T, *scales.scale(module))
    return AdapterFile(path.resolve().name, str(path), HUGGING_FACE, changes, replaced)


@dataclass(frozen=True)
class _Config:
    """What scales depend on, and which parameters were adapted that are not the weight of a linear layer."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilized: bool
    parameters: Sequence[str]

    @classmethod
    def read(cls, config: Entries) -> "_Config":
        if (kind := config.text("peft_type")) != "LORA":
            raise InputError(f"{config.where}: an adapter of type {reprlib.repr(kind)}; of PEFT's, only LORA is read")
        for key, what in _BEYOND.items():
            if config.values.get(key):
                raise InputError(f"{config.where}: '{key}' is set: {what} is not read; merge it with peft")
        start = config.values.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASE):
            raise InputError(
                f"{config.where}: it began as {reprlib.repr(start)}, on a base that was changed; save it for the "
                f"original base (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        ranks, alphas = (_patterns(config, f"{part}_pattern") for part in ("rank", "alpha"))
        names = config.get("target_parameters", [], _is_list_of_text, "a list of names")
        return cls(
            config.where,
            config.integer("r"),
            config.number("lora_alpha", above=-math.inf),
            {key: ranks.integer(key) for key in ranks.values},
            {key: alphas.number(key, above=-math.inf) for key in alphas.values},
            config.flag("use_rslora"),
            names,
        )

    def scale(self, key: str) -> tuple[int, float]:
        """Rank and scale of the module or parameter `key`."""
        rank = next((r for pattern, r in self.ranks.items() if _fits(pattern, key)), self.rank)
        alpha = next((a for pattern, a in self.alphas.items() if _fits(pattern, key)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def change(self, module: str, depth: int, a: np.ndarray, b: np.ndarray) -> tuple[str, LowRank]:
        """The adapted tensor's name, and its change.

        Args:
            depth: each parameter of a module that was adapted, but the last, has its pair one `base_layer` deeper.
            a: `[rank, in]`; of a stack `[experts * rank, in]`.
            b: `[out, rank]`; of a stack `[out, rank * experts]`.
        """
        if not (wrapped := [p for p in _PARAMETERS if self._is_parameter(module, p)]):
            name = module + ".weight"
            return name, low_rank(name, a, b, *self.scale(module))
        if depth >= len(wrapped):
            raise InputError(f"more of {module} is adapted than 'target_parameters' names: {', '.join(wrapped)}")
        name = f"{module}.{wrapped[::-1][depth]}"
        rank, scale = self.scale(name)
        if not name.endswith(".weight") and a.ndim == b.ndim == 2 and a.shape[0] % rank == 0 == b.shape[-1] % rank:
            a = a.reshape(-1, rank, a.shape[-1])
            b = b.reshape(len(b), rank, -1).transpose(2, 0, 1)
        return name, low_rank(name, a, b, rank, scale)

    def _is_parameter(self, module: str, name: str) -> bool:
        """Whether a target means this parameter of the module. One that names no module means those of experts: peft
        0.21 writes such for stacks, of which `down_proj` is also the name of a module elsewhere."""
        named = [target for target in self.parameters if "." in target or module.endswith("experts")]
        return any(f".{module}.{name}".endswith(f".{target}") for target in named)


def _fits(pattern: str, key: str) -> bool:
    """Whether a pattern of `rank_pattern` or `alpha_pattern` means a module: by the last parts of its name."""
    return matches(pattern, key, r"(.*\.)?({})$")


def _patterns(config: Entries, key: str) -> Entries:
    values = config.get(key, {}, lambda value: isinstance(value, dict), "an object")
    for pattern in values:
        if not pattern.isprintable():  # it will be part of one-line messages
            raise InputError(f"{config.where}: '{key}': {pattern[:64]!r} is not a pattern of names")
        with located(f"{config.where}: '{key}'"):
            _fits(pattern, "")
    return Entries(values, f"{config.where}: {key}")


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
