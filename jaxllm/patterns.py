"""Regular expressions that a checkpoint, an adapter or a topology contains, for the names of modules.

Most are names, or match in one go; those that could go on for ever are matched by the `confined` process.
"""

import re
from functools import lru_cache

from jaxllm.confined import ask
from jaxllm.errors import InputError

# What is tried in several ways, one after the other, takes time like a power of the text's length, or like one of 2; a
# repeated group may take that alone.
_CHOICES, _LENGTH, _LONGEST = 3, 200, 2000


def matches(pattern: str, text: str, around: str = "{}") -> bool:
    """Whether a pattern is found at the beginning of `text`. Raises InputError if it is none, or takes too long.

    Args:
        around: the pattern that is meant, with "{}" for the one that was given.
    """
    return _found(pattern, around, text, match=True)


def occurs(pattern: str, text: str) -> bool:
    """Whether a pattern is found in `text`. Raises InputError likewise."""
    return _found(pattern, "{}", text, match=False)


@lru_cache(1000)
def _compiled(pattern: str, around: str) -> re.Pattern[str] | None:
    """What is meant, or None if matching has to be `confined`."""
    if len(pattern) > _LONGEST:
        raise InputError(f"{pattern[:64]!r} and so on is {len(pattern)} characters long, which no pattern of names is")
    try:
        made = re.compile(around.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{pattern[:64]!r} is no regular expression: {error}") from error
    quick = len(re.findall(r"[*+{|]|(?<!\()\?", pattern)) <= _CHOICES and not re.search(r"\)[*+{]", pattern)
    return made if quick else None


@lru_cache(100_000)
def _found(pattern: str, around: str, text: str, match: bool) -> bool:
    made = _compiled(pattern, around)
    if made is not None and len(text) <= _LENGTH:
        return (made.match if match else made.search)(text) is not None
    try:
        return ask("search", pattern=around.replace("{}", pattern), text=text, match=match)
    except InputError as error:
        raise InputError(f"the pattern {pattern[:64]!r}: {error}") from error
