"""Matmuls of MXFP4 weights, in which GPT-OSS is published."""
