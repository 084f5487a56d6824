"""An OpenAI-compatible server over the engine, which `jaxllm.serve` starts."""
