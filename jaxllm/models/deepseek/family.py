"""DeepSeek-V2 and V3 as a family. Besides the usual kinds of files, there are those of DeepSeek's inference demo."""

from jaxllm.models.deepseek import names
from jaxllm.models.deepseek.config import DEMO_TYPE, GGUF_ARCHITECTURES, MODEL_TYPES, PRESETS, DeepseekConfig
from jaxllm.models.deepseek.model import deepseek
from jaxllm.models.family import DEEPSEEK_DEMO, GGUF, HUGGING_FACE, Dialect, Family

DEEPSEEK = Family(
    "DeepSeek",
    deepseek,
    DeepseekConfig,
    {
        GGUF: Dialect(GGUF_ARCHITECTURES, DeepseekConfig.from_gguf, names.gguf_rules, names.gguf_ignored),
        HUGGING_FACE: Dialect(MODEL_TYPES, DeepseekConfig.from_hf, names.hf_rules, names.hf_ignored),
        DEEPSEEK_DEMO: Dialect((DEMO_TYPE,), DeepseekConfig.from_demo, names.demo_rules),
    },
    options={"attention": {"absorbed": {}, "naive": {"per_head_cache": True}}},
    presets=PRESETS,
)
