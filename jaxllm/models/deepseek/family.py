"""DeepSeek-V2 and V3 as a family. Besides the usual kinds of files, there are those of DeepSeek's inference demo."""

from jaxllm.models.deepseek import describe, names
from jaxllm.models.deepseek.config import DEMO_TYPE, GGUF_ARCHITECTURES, MODEL_TYPES, PRESETS, DeepseekConfig
from jaxllm.models.deepseek.model import deepseek
from jaxllm.models.family import DEEPSEEK_DEMO, GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.rope_describing import gguf_rotary, hf_rotary

DEEPSEEK = Family(
    "DeepSeek",
    deepseek,
    DeepseekConfig,
    {
        GGUF: Dialect(
            GGUF_ARCHITECTURES,
            DeepseekConfig.from_gguf,
            names.gguf_rules,
            names.gguf_ignored,
            describe.as_gguf,
            describe.gguf_metadata,
            gguf_rotary,
            names.gguf_written,
        ),
        HUGGING_FACE: Dialect(
            MODEL_TYPES,
            DeepseekConfig.from_hf,
            names.hf_rules,
            names.hf_ignored,
            describe.as_hf,
            describe.hf_config,
            hf_rotary,
            names.hf_written,
        ),
        DEEPSEEK_DEMO: Dialect(
            (DEMO_TYPE,), DeepseekConfig.from_demo, names.demo_rules, rotary=describe.demo_rotary_settings
        ),
    },
    options={"attention": {"absorbed": {}, "naive": {"per_head_cache": True}}},
    presets=PRESETS,
    divided=names.divided,
)
