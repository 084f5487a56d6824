"""Llama and its kin as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.llama import describe, names
from jaxllm.models.llama.config import GGUF_ARCHITECTURES, MODEL_TYPES, PRESETS, LlamaConfig
from jaxllm.models.llama.model import llama
from jaxllm.models.names import gguf_ignored, hf_ignored
from jaxllm.models.rope_describing import gguf_rotary, hf_rotary

LLAMA = Family(
    "Llama",
    llama,
    LlamaConfig,
    {
        GGUF: Dialect(
            GGUF_ARCHITECTURES,
            LlamaConfig.from_gguf,
            names.gguf_rules,
            gguf_ignored,
            describe.as_gguf,
            describe.gguf_metadata,
            gguf_rotary,
            names.gguf_written,
        ),
        HUGGING_FACE: Dialect(
            MODEL_TYPES,
            LlamaConfig.from_hf,
            names.hf_rules,
            hf_ignored,
            describe.as_hf,
            describe.hf_config,
            hf_rotary,
            names.hf_written,
        ),
    },
    presets=PRESETS,
)
