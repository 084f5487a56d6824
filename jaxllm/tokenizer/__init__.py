"""Text to token ids and back, and conversations to text."""

from jaxllm.tokenizer.chat import ChatTemplate
from jaxllm.tokenizer.text import TextStream, Tokenizer

__all__ = ["ChatTemplate", "TextStream", "Tokenizer"]
