"""What a model needs on devices that need not exist, see `jaxllm.plan`."""
