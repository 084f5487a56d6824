"""An OpenAI-compatible server over the engine: what goes over HTTP, and the parts of answers."""
