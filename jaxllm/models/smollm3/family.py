"""SmolLM3 as a family."""

from jaxllm.models import names
from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.rope_describing import gguf_rotary
from jaxllm.models.rule import fixed
from jaxllm.models.smollm3 import config
from jaxllm.models.smollm3.config import SmolLM3Config
from jaxllm.models.smollm3.model import smollm3

SMOLLM3 = Family(
    "SmolLM3",
    smollm3,
    SmolLM3Config,
    {
        GGUF: Dialect(
            config.GGUF_ARCHITECTURES,
            SmolLM3Config.from_gguf,
            fixed(*names.GGUF_LLAMA),
            names.gguf_ignored,
            describes=config.gguf_metadata,
            rotary=gguf_rotary,
        ),
        HUGGING_FACE: Dialect(
            config.MODEL_TYPES,
            SmolLM3Config.from_hf,
            fixed(*names.HF_LLAMA),
            names.hf_ignored,
            describes=config.hf_config,
            rotary=config.rotary_of_hf,
        ),
    },
)
