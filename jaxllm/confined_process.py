"""The program behind `confined`: requests come as lines of JSON, and each is answered with one.

It is run as a file, so that it need not wait for JAX, and imports nothing of jaxllm.
"""

import json
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

SECONDS, MEMORY = 2, 512 << 20  # of the CPU for a request, rounded up; of address space
QUICK = 0.1  # seconds of the CPU for one search; those of published patterns take microseconds
MOST_TEXT = 1 << 22  # characters that a template may write beside what it was given


def render(source: str, now: str, variables: Mapping[str, object] | None) -> str:
    """A chat template's text for these variables; None: it is only compiled. `now` is the time in ISO 8601."""
    template = _template(source)
    if variables is None:
        return ""
    text = template.render(**variables, strftime_now=datetime.fromisoformat(now).strftime)
    if len(text) > MOST_TEXT + 4 * len(str(variables)):
        raise ValueError(f"writes {len(text)} characters")
    return text


@lru_cache(16)
def _template(source: str):  # noqa: ANN202
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = fail
    return environment.from_string(source)


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML, which models have never seen.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def search(pattern: str, text: str, match: bool) -> bool:
    """Whether a regular expression is found in a text, or at its beginning. Texts may be many: each has to be quick."""
    begun = time.process_time()
    found = (re.match if match else re.search)(pattern, text) is not None
    if (seconds := time.process_time() - begun) > QUICK:
        raise ValueError(f"takes {seconds:.1f} seconds of computing for one name")
    return found


WORK: dict[str, Callable] = {"render": render, "search": search}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is the other process's business
    with suppress(ValueError):  # macOS does not let it be set
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import jinja2.sandbox  # noqa: F401  # while nobody waits yet

    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))  # then the process is ended
        try:
            request = json.loads(line)
            answer = [WORK[request.pop("work")](**request), None]
        except MemoryError:
            answer = [None, f"needs more than {MEMORY >> 20} MiB of memory"]
        except Exception as error:  # a template can raise anything that Python can
            answer = [None, str(error).strip().partition("\n")[0] or repr(error)]
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
