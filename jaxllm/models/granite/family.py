"""Granite as a family."""

from jaxllm.models import names
from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.granite import config
from jaxllm.models.granite.config import GraniteConfig
from jaxllm.models.granite.model import granite
from jaxllm.models.rope_describing import gguf_rotary, hf_rotary
from jaxllm.models.rule import fixed

GRANITE = Family(
    "Granite",
    granite,
    GraniteConfig,
    {
        GGUF: Dialect(
            config.GGUF_ARCHITECTURES,
            GraniteConfig.from_gguf,
            fixed(*names.GGUF_LLAMA),
            names.gguf_ignored,
            describes=config.gguf_metadata,
            rotary=gguf_rotary,
        ),
        HUGGING_FACE: Dialect(
            config.MODEL_TYPES,
            GraniteConfig.from_hf,
            fixed(*names.HF_LLAMA),
            names.hf_ignored,
            describes=config.hf_config,
            rotary=hf_rotary,
        ),
    },
)
