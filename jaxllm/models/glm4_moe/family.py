"""GLM-4.5 as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.glm4_moe import config, names
from jaxllm.models.glm4_moe.config import Glm4MoeConfig
from jaxllm.models.glm4_moe.model import glm4_moe
from jaxllm.models.rope_describing import gguf_rotary

GLM4_MOE = Family(
    "GLM-4.5",
    glm4_moe,
    Glm4MoeConfig,
    {
        GGUF: Dialect(
            config.GGUF_ARCHITECTURES,
            Glm4MoeConfig.from_gguf,
            names.gguf_rules,
            names.gguf_ignored,
            config.as_gguf,
            config.gguf_metadata,
            rotary=gguf_rotary,
        ),
        HUGGING_FACE: Dialect(
            config.MODEL_TYPES,
            Glm4MoeConfig.from_hf,
            names.hf_rules,
            names.hf_ignored,
            config.as_hf,
            config.hf_config,
            rotary=config.rotary_of_hf,
        ),
    },
)
