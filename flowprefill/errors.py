"""Every error a user can meet, one tree; each class owns its HTTP status and OpenAI error type.

Raised by every layer; the server turns them into responses, the CLI into one line and a status.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import Any, ClassVar

SHOWN_CHARS = 80
# An integer of more digits than this is not written out: Python refuses at 4300, and it is slow.
SHOWN_BITS = 256


class _Shortened(reprlib.Repr):
    """A repr of bounded cost: values may be lists of millions, or numbers of as many digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 10
        self.maxlevel, self.maxstring, self.maxother = 3, SHOWN_CHARS, SHOWN_CHARS

    def repr_int(self, value: int, level: int) -> str:  # noqa: ARG002
        bits = value.bit_length()
        return repr(value) if bits <= SHOWN_BITS else f"an integer of {bits} bits"

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        # The base class sorts all keys first.
        shown = [
            f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}"
            for key, item in islice(value.items(), self.maxdict)
        ]
        more = ["..."] if len(value) > self.maxdict else []
        return "{" + ", ".join(shown + more) + "}"


class _Json(_Shortened):
    """The same with JSON's words for what it writes otherwise than Python."""

    def repr_bool(self, value: bool, level: int) -> str:  # noqa: ARG002
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: ARG002, N802 - the type's name
        return "null"


def shortened(value: Any, *, as_json: bool = False) -> str:
    """Return a repr of at most 80 characters, at a cost that does not grow with the value.

    Args:
        as_json: write null, true and false.
    """
    shown = (_Json() if as_json else _Shortened()).repr(value)
    if len(shown) > SHOWN_CHARS:
        shown = shown[: SHOWN_CHARS - 3] + "..."
    is_many = isinstance(value, (list, tuple, dict)) and len(value) > 10
    return f"{shown} ({len(value)} items)" if is_many else shown


def exact(number: float) -> str:
    """Return a number in full: of 1048576 the format `g` makes 1.04858e+06, which is over it."""
    return str(int(number)) if number == int(number) else repr(number)


def within(low: float, high: float) -> str:
    """Return the words for a range that both ends belong to."""
    return f"in [{exact(low)}, {exact(high)}]"


class FlowPrefillError(Exception):
    """Base of all errors raised on purpose. Anything else that escapes is a bug of ours."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(FlowPrefillError):
    """A field of a request is wrong; names the field, what was given and what is allowed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    given: Any = ...  # what a field had that the message shows as Python writes it

    @classmethod
    def field(cls, param: str, value: Any, allowed: str) -> InvalidRequest:
        """Build the error for one field.

        Args:
            param: the field as the user wrote it, e.g. ``"temperature"``.
            value: what was given; shown shortened.
            allowed: what is allowed, e.g. ``"a number in [0, 2]"``.
        """
        error = cls(f"{param}: got {shortened(value)}, expected {allowed}", param=param)
        error.given = value
        return error

    @property
    def json_message(self) -> str:
        """The message for one who wrote JSON: null instead of None."""
        if self.given is ...:
            return self.message
        was, now = (
            f": got {shortened(self.given, as_json=is_json)}, " for is_json in (False, True)
        )
        return self.message.replace(was, now, 1)


class PromptTooLong(InvalidRequest):
    """The prompt can never fit, by the model's length or the KV cache; the message has numbers."""

    code = "context_length_exceeded"


def overflow(max_tokens: int) -> str:
    """Return the sentence by which gateways and agents tell that a prompt is too long."""
    return f"This model's maximum context length is {max_tokens} tokens."


class ModelNotFound(FlowPrefillError):
    """The request names a model this engine does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class Overloaded(FlowPrefillError):
    """Too much is waiting, or the request would be late; ``retry_after_s`` says when to come back.

    Attributes:
        retry_after_s: predicted seconds until one like it would be admitted, if no other came; inf:
            the request would be late whenever it came.
    """

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlinePassed(FlowPrefillError):
    """The request asked to be dropped once its TTFT objective could not be met."""

    status = 504
    type = "timeout_error"
    code = "deadline_passed"


class NotReady(FlowPrefillError):
    """The engine is loading or shutting down."""

    status = 503
    type = "server_error"
    code = "not_ready"


class RequestCancelled(FlowPrefillError):
    """The request was cancelled; raised to every caller that still waits for its result."""

    status = 499
    type = "request_cancelled"
    code = "cancelled"


class RequestFailed(FlowPrefillError):
    """A segment of the request's run failed; the message names operator, layer and request."""

    code = "run_failed"


class ProcessNotStarted(FlowPrefillError):
    """A process of the server's own does not start; no request is to blame, the log says why."""

    code = "process_not_started"


class ConfigError(FlowPrefillError, ValueError):
    """A setting at start is unknown or has a bad value; the engine does not start."""

    code = "bad_config"


def no_threads(which: str, error: RuntimeError) -> ConfigError:
    """Return the error for threads of the engine that the system does not start."""
    return ConfigError(
        f"threads: the system does not start {which} ({error}), expected fewer, or higher limits "
        "(ulimit -u and -v, a control group's pids.max)",
        param="threads",
    )


class CheckpointError(FlowPrefillError):
    """A model file is missing, truncated, or of a kind that is not supported."""

    code = "bad_checkpoint"
