"""Errors as OpenAI's clients read them: a status, and `{"error": {message, type, param, code}}`."""

import re
from typing import Any

from pydantic import ValidationError

from jaxllm.errors import InputError

INVALID = "invalid_request_error"


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line for whoever sent it.
        type: OpenAI's class of errors.
        code: which error it is, where OpenAI has a word for it.
        param: the field of the body that is to blame.
        retry_after: seconds after which it may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.code, self.param = status, type, code, param
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def as_request_error(error: Exception) -> RequestError:
    """What the sender of a request is told of `error`: of a mistake of ours, only that there was one."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValidationError):
        # Where there are alternatives, each has an error. The one that fits best got furthest, and names of types
        # and classes stand between those of fields.
        found = max(
            error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
        )
        parts = (str(part) for part in found["loc"])
        where = ".".join(part for part in parts if re.fullmatch("[a-z0-9_]+", part) and part not in ("str", "int"))
        message = found["msg"].removeprefix("Value error, ")
        return RequestError(400, f"{where}: {message}" if where else message, param=where or None)
    if isinstance(error, InputError):
        return RequestError(400, " ".join(str(error).split()))
    return RequestError(500, "the server failed to answer this request", "server_error", "internal_error")
