"""Matmuls of codes in planes (`jaxllm.formats.planes`): one kernel a platform for all formats of 1 to 8 bits."""
