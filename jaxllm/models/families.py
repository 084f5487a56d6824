"""All families of models that there are. A new one is its record and a line here, or `FAMILIES.append` from outside."""

from jaxllm.models.deepseek.family import DEEPSEEK
from jaxllm.models.family import Family
from jaxllm.models.gpt_oss.family import GPT_OSS
from jaxllm.models.llama.family import LLAMA

FAMILIES: list[Family] = [LLAMA, DEEPSEEK, GPT_OSS]
