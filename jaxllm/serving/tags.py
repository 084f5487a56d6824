"""Text up to a tag such as `</think>`, which comes in pieces of any length."""


class Until:
    """Passes on the text before a tag.

    White space next to a tag belongs to the tag: models write line breaks there, which are not part of the text.

    Args:
        tag: where the text ends.
        after_tag: whether it begins after one.

    Attributes:
        rest: what follows the tag, once it has been read; None before.
        space: the white space before the tag, likewise.
    """

    def __init__(self, tag: str, after_tag: bool = True) -> None:
        self._tag, self._at_tag = tag, after_tag
        self._held = ""
        self.rest: str | None = None
        self.space = ""

    def push(self, text: str) -> str:
        """The text that is known to come before the tag."""
        held = self._held + text
        place = held.find(self._tag)
        if place >= 0:
            known = held[:place].rstrip()
            self.space, self.rest, self._held = held[len(known) : place], held[place + len(self._tag) :], ""
            return self._begun(known)
        known = held[: len(held) - _overlap(held, self._tag)].rstrip()
        self._held = held[len(known) :]
        return self._begun(known)

    def finish(self) -> str:
        """What was held back, as the tag might have begun there, or the white space before it."""
        return self._begun(self._held)

    def _begun(self, text: str) -> str:
        if self._at_tag:
            text = text.lstrip()
            self._at_tag = not text
        return text


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` are the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
