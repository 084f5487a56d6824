"""Real, quantized large language models in JAX, on any mesh of devices."""

from jaxllm.errors import InputError
from jaxllm.language_model import Completion, LanguageModel
from jaxllm.loading import load
from jaxllm.parallel import make_mesh
from jaxllm.quantize import quantize
from jaxllm.sampling import Sampler

__all__ = ["Completion", "InputError", "LanguageModel", "Sampler", "load", "make_mesh", "quantize"]
