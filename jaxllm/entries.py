"""Key/value descriptions in files (a config.json, GGUF metadata), read with type checks."""

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError
from jaxllm.files import read_small


def read_json(file: Path, where: str | None = None) -> dict[str, Any]:
    """A JSON object; `where` stands for the file in errors.

    Raises:
        InputError: there is no such file, or it does not hold a JSON object.
    """
    return json_object(read_small(file), where or str(file))


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`, which errors call `where`. Raises InputError if it is something else."""
    try:
        value = json.loads(text.decode())
    except RecursionError as error:
        raise InputError(f"{where}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


@dataclass(frozen=True)
class Entries:
    """Entries of a JSON object, read with type checks. A null counts as a missing entry.

    Every method raises InputError if an entry has the wrong type, or is missing and has no default.
    """

    values: Mapping[str, object]
    where: str  # for errors

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: object, good: Callable[[Any], bool], what: str) -> Any:
        value = self.values[key] if key in self else default
        if value is None:
            raise InputError(f"{self.where}: '{key}' is missing")
        if not good(value):
            raise InputError(f"{self.where}: '{key}' is {reprlib.repr(value)}, not {what}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = 2**24) -> int:
        what = f"a whole number from {least} to {most}"
        return self.get(key, default, lambda value: type(value) is int and least <= value <= most, what)

    def integer_up_to(self, key: str, limit: int, limit_key: str, default: int | None = None) -> int:
        """A whole number from 1 to `limit`, the value of the entry `limit_key`."""
        value = self.integer(key, default)
        if value > limit:
            raise InputError(f"{self.where}: '{key}' is {value}, more than '{limit_key}', which is {limit}")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        above: float = 0.0,
        most: float = math.inf,
        least: float | None = None,
    ) -> float:
        """A finite number: above `above` or, if `least` is given, at least `least`."""
        bound = "" if above == -math.inf else f" above {above:g}"
        what = f"a number{bound}" if least is None else f"a number of {least:g} or more"
        what += f", at most {most:g}" if most < math.inf else ""

        def good(value: Any) -> bool:
            return _is_number(value) and (above < value if least is None else least <= value) and value <= most

        return self.get(key, default, good, what)

    def numbers(self, key: str, count: int) -> list[float]:
        """`count` numbers above 0."""

        def good(value: object) -> bool:
            return isinstance(value, list) and len(value) == count and all(_is_number(n) and n > 0 for n in value)

        return self.get(key, None, good, f"a list of {count} numbers above 0")

    def text(self, key: str, default: str | None = None) -> str:
        return self.get(key, default, lambda value: isinstance(value, str), "text")

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        what = f"one of {', '.join(choices)}"
        return self.get(key, default, lambda value: isinstance(value, str) and value in choices, what)

    def flag(self, key: str, default: bool = False) -> bool:
        return self.get(key, default, lambda value: isinstance(value, bool), "true or false")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**127
