"""A process that compiles the grammar in its input and tells the error: `python structured_trial.py SECONDS SYMBOLS`.

It is started as a file, as importing the package takes longer than what it does.
"""

import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MEMORY = 2**31
STEPS = 16  # of an answer: some grammars compile, and are too ambiguous for the parser from the first characters on


class Bytes:
    """The smallest tokenizer: a token is a byte, or the end."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([i]) for i in range(256)), b"<end>"]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    seconds, symbols = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    limits = LLParserLimits(max_grammar_size=symbols, verbose_errors=False)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), log_level=0, limits=limits)
    for _ in range(STEPS):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & (1 << 256) - 1
        if matcher.is_stopped() or not allowed:
            break
        matcher.consume_token(allowed.bit_length() - 1)
    error = matcher.get_error()
    sys.stdout.write("nothing satisfies it" if error.startswith("NoExtension") else error)


if __name__ == "__main__":
    main()
