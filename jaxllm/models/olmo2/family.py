"""OLMo 2 as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.names import gguf_ignored, hf_ignored
from jaxllm.models.olmo2 import config, names
from jaxllm.models.olmo2.config import Olmo2Config
from jaxllm.models.olmo2.model import olmo2
from jaxllm.models.rope_describing import gguf_rotary, hf_rotary

OLMO2 = Family(
    "OLMo 2",
    olmo2,
    Olmo2Config,
    {
        GGUF: Dialect(
            config.GGUF_ARCHITECTURES,
            Olmo2Config.from_gguf,
            names.gguf_rules,
            gguf_ignored,
            describes=config.gguf_metadata,
            rotary=gguf_rotary,
        ),
        HUGGING_FACE: Dialect(
            config.MODEL_TYPES,
            Olmo2Config.from_hf,
            names.hf_rules,
            hf_ignored,
            describes=config.hf_config,
            rotary=hf_rotary,
        ),
    },
)
