"""Llama and its kin as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.llama import names
from jaxllm.models.llama.config import GGUF_ARCHITECTURES, MODEL_TYPES, LlamaConfig
from jaxllm.models.llama.model import llama
from jaxllm.models.names import hf_ignored

LLAMA = Family(
    "Llama",
    llama,
    LlamaConfig,
    {
        GGUF: Dialect(GGUF_ARCHITECTURES, LlamaConfig.from_gguf, names.gguf_rules, names.gguf_ignored),
        HUGGING_FACE: Dialect(MODEL_TYPES, LlamaConfig.from_hf, names.hf_rules, hf_ignored),
    },
)
