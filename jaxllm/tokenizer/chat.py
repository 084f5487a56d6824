"""Chat templates: Jinja from a model file, which is not trusted, so it runs in a sandbox in a process of its own."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from jaxllm.confined import ask
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
        self.source, self._variables = source, dict(variables)
        self._run(None)

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: object) -> str:
        """The conversation as the text that the model was trained on.

        Args:
            variables: what else the template knows, such as `tools` or `reasoning_effort`; what JSON can say.

        Raises:
            InputError: the template refuses the messages, fails, reaches outside its sandbox, or takes too much time or
                memory.
        """
        conversation = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._run(self._variables | variables | conversation)

    def _run(self, variables: Mapping[str, object] | None) -> str:
        try:
            return ask("render", source=self.source, now=datetime.now().isoformat(), variables=variables)
        except InputError as error:
            raise InputError(f"chat template: {error}") from error
