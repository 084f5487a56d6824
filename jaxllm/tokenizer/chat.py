"""Chat templates: Jinja from a model file, which is not trusted, so it runs in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.errors import InputError

Messages = Sequence[Mapping[str, object]]


class ChatTemplate:
    """A template as Hugging Face tokenizers carry it, with the functions that such templates call.

    Args:
        source: Jinja text.
        variables: what it may use besides the messages, such as `bos_token`.

    Attributes:
        source: the same text.

    Raises:
        InputError: the text is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"chat template: {error}") from error

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: object) -> str:
        """The conversation as the text that the model was trained on.

        Args:
            variables: what else the template knows, such as `tools` or `reasoning_effort`.

        Raises:
            InputError: the template refuses the messages, fails, or reaches outside its sandbox.
        """
        try:
            return self._template.render(
                **self._variables | variables,
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template can raise anything that Python can
            raise InputError(f"chat template: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML, which models have never seen.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
