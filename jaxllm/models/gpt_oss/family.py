"""GPT-OSS as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.gpt_oss import describe, names
from jaxllm.models.gpt_oss.config import GGUF_ARCHITECTURES, MODEL_TYPES, PRESETS, GptOssConfig
from jaxllm.models.gpt_oss.model import gpt_oss
from jaxllm.models.names import hf_ignored

GPT_OSS = Family(
    "GPT-OSS",
    gpt_oss,
    GptOssConfig,
    {
        GGUF: Dialect(
            GGUF_ARCHITECTURES,
            GptOssConfig.from_gguf,
            names.gguf_rules,
            adapted=describe.as_gguf,
            describes=describe.gguf_metadata,
            rotary=describe.rotary_of_gguf,
        ),
        HUGGING_FACE: Dialect(
            MODEL_TYPES,
            GptOssConfig.from_hf,
            names.hf_rules,
            hf_ignored,
            describe.as_hf,
            describe.hf_config,
            describe.rotary_of_hf,
        ),
    },
    presets=PRESETS,
)
