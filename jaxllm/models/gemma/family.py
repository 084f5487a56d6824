"""Gemma 2 and 3 as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.gemma import describe, names
from jaxllm.models.gemma.config import GGUF_ARCHITECTURES, MODEL_TYPES, GemmaConfig
from jaxllm.models.gemma.model import gemma

GEMMA = Family(
    "Gemma",
    gemma,
    GemmaConfig,
    {
        GGUF: Dialect(
            GGUF_ARCHITECTURES,
            GemmaConfig.from_gguf,
            names.gguf_rules,
            adapted=describe.as_gguf,
            describes=describe.gguf_metadata,
            rotary=describe.rotary_of_gguf,
            written=names.gguf_written,
        ),
        HUGGING_FACE: Dialect(
            MODEL_TYPES,
            GemmaConfig.from_hf,
            names.hf_rules,
            names.hf_ignored,
            describe.as_hf,
            describe.hf_config,
            describe.rotary_of_hf,
            names.hf_written,
        ),
    },
)
