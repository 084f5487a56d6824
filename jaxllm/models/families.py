"""All families of models. To add one, write its record and list it here, or call `FAMILIES.append` from outside."""

from jaxllm.models.deepseek.family import DEEPSEEK
from jaxllm.models.family import Family
from jaxllm.models.gemma.family import GEMMA
from jaxllm.models.gemma3n.family import GEMMA3N
from jaxllm.models.glm4.family import GLM4
from jaxllm.models.glm4_moe.family import GLM4_MOE
from jaxllm.models.gpt_oss.family import GPT_OSS
from jaxllm.models.granite.family import GRANITE
from jaxllm.models.llama.family import LLAMA
from jaxllm.models.olmo2.family import OLMO2
from jaxllm.models.smollm3.family import SMOLLM3

FAMILIES: list[Family] = [LLAMA, DEEPSEEK, GPT_OSS, GEMMA, GEMMA3N, GRANITE, SMOLLM3, OLMO2, GLM4, GLM4_MOE]
