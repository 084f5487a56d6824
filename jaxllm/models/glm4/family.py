"""GLM-4 as a family."""

from jaxllm.models.family import GGUF, HUGGING_FACE, Dialect, Family
from jaxllm.models.glm4 import config, names
from jaxllm.models.glm4.config import Glm4Config
from jaxllm.models.glm4.model import glm4
from jaxllm.models.names import gguf_ignored, hf_ignored
from jaxllm.models.rope_describing import gguf_rotary

GLM4 = Family(
    "GLM-4",
    glm4,
    Glm4Config,
    {
        GGUF: Dialect(
            config.GGUF_ARCHITECTURES,
            Glm4Config.from_gguf,
            names.gguf_rules,
            gguf_ignored,
            describes=config.gguf_metadata,
            rotary=gguf_rotary,
        ),
        HUGGING_FACE: Dialect(
            config.MODEL_TYPES,
            Glm4Config.from_hf,
            names.hf_rules,
            hf_ignored,
            describes=config.hf_config,
            rotary=config.rotary_of_hf,
        ),
    },
)
