"""Real, quantized large language models in JAX, on any mesh of devices."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from jaxllm import sources

if TYPE_CHECKING:
    from jaxllm.engine.answer import Completion as Completion
    from jaxllm.engine.drafting import DraftModel as DraftModel
    from jaxllm.engine.drafting import PromptLookup as PromptLookup
    from jaxllm.engine.engine import Engine as Engine
    from jaxllm.engine.memory import Memory as Memory
    from jaxllm.errors import InputError as InputError
    from jaxllm.finetuning.loop import Finetuned as Finetuned
    from jaxllm.finetuning.loop import finetune as finetune
    from jaxllm.initializing import PRESETS as PRESETS
    from jaxllm.initializing import initialize as initialize
    from jaxllm.language_model import LanguageModel as LanguageModel
    from jaxllm.loading import load as load
    from jaxllm.parallel import make_mesh as make_mesh
    from jaxllm.planning.planner import plan as plan
    from jaxllm.requantize import quantize as quantize
    from jaxllm.sampling import Sampler as Sampler
    from jaxllm.sampling import Sampling as Sampling
    from jaxllm.structured import Constraint as Constraint

    __version__: str

# Imported on first use, so that `jaxllm --help` need not wait for JAX. No name may equal that of a module,
# which importing the module would put in its place; but the modules `plan` and `finetune` can be called.
_MODULES = {
    "Completion": "engine.answer",
    "Constraint": "structured",
    "DraftModel": "engine.drafting",
    "Engine": "engine.engine",
    "Finetuned": "finetuning.loop",
    "InputError": "errors",
    "LanguageModel": "language_model",
    "Memory": "engine.memory",
    "PRESETS": "initializing",
    "PromptLookup": "engine.drafting",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "finetune": "finetuning.loop",
    "initialize": "initializing",
    "load": "loading",
    "make_mesh": "parallel",
    "plan": "planning.planner",
    "quantize": "requantize",
}
__all__ = sorted([*_MODULES, "__version__"])

if sources.run_alone():
    sources.remember()


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("jaxllm")
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxllm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"jaxllm.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
