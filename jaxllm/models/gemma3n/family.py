"""Gemma 3n's text model as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family, MatFormer
from jaxllm.models.gemma3n import describe, matformer, names
from jaxllm.models.gemma3n.config import GGUF_ARCHITECTURES, MODEL_TYPES, PRESETS, Gemma3nConfig
from jaxllm.models.gemma3n.model import gemma3n

GEMMA3N = Family(
    "Gemma 3n",
    gemma3n,
    Gemma3nConfig,
    {
        GGUF: Dialect(
            GGUF_ARCHITECTURES,
            Gemma3nConfig.from_gguf,
            names.gguf_rules,
            names.gguf_ignored,
            rotary=describe.rotary_of_gguf,
        ),
        HUGGING_FACE: Dialect(
            MODEL_TYPES,
            Gemma3nConfig.from_hf,
            names.hf_rules,
            names.hf_ignored,
            describe.as_hf,
            describe.hf_config,
            describe.rotary_of_hf,
        ),
    },
    presets=PRESETS,
    matformer=MatFormer(matformer.sliced, matformer.places, describe.resized),
)
