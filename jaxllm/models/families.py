"""All families of models. To add one, write its record and list it here, or call `FAMILIES.append` from outside."""

from jaxllm.models.deepseek.family import DEEPSEEK
from jaxllm.models.family import Family
from jaxllm.models.gemma.family import GEMMA
from jaxllm.models.gemma3n.family import GEMMA3N
from jaxllm.models.gpt_oss.family import GPT_OSS
from jaxllm.models.llama.family import LLAMA

FAMILIES: list[Family] = [LLAMA, DEEPSEEK, GPT_OSS, GEMMA, GEMMA3N]
