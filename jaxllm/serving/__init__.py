"""An OpenAI-compatible server over the engine; `jaxllm.serve` starts it."""
