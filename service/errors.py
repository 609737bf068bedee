"""The error tree. Every class carries its HTTP status and a stable code; one handler in `api` renders them.

A message names the offending value and the bound it broke. `param` is the dotted path of the request field at fault.
"""

from __future__ import annotations


class DetotError(Exception):
    """Base of all errors that a user may see.

    Attributes:
        status: HTTP status the error is answered with.
        code: stable machine-readable identifier.
        param: dotted path of the field at fault, or None.
        retry_after: seconds after which a retry makes sense, or None.
    """

    status: int = 500
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(DetotError):
    """A value in the request is outside its bounds or of the wrong type."""

    status, code = 400, "invalid_request"


class UnsupportedField(InvalidRequest):
    """A well-formed field asks for something the engine cannot honour."""

    code = "unsupported_field"


class PromptTooLong(InvalidRequest):
    """Prompt plus requested tokens exceed the model's context length."""

    code = "context_length_exceeded"


class Unauthorized(DetotError):
    """No key, or a key nobody issued."""

    status, code = 401, "invalid_api_key"


class Forbidden(DetotError):
    """The key lacks the scope that the operation needs."""

    status, code = 403, "insufficient_scope"


class NotFound(DetotError):
    """The named task, version, model or request does not exist."""

    status, code = 404, "not_found"


class UnknownModel(NotFound):
    """The named model is not the one served here."""

    code = "model_not_found"


class UnknownTask(NotFound):
    """The named task is not in the catalogue."""

    code = "task_not_found"


class Conflict(DetotError):
    """The state moved on: a compare-and-set found another value than expected."""

    status, code = 409, "conflict"


class BodyTooLarge(DetotError):
    """The request body exceeds the configured limit."""

    status, code = 413, "body_too_large"


class InvalidArtifact(DetotError):
    """An offset artifact that must not be served: wrong model, shape, dtype, checksum, or not finite."""

    status, code = 422, "invalid_offset_artifact"


class InvalidCatalogue(DetotError):
    """A mistake in a task catalogue; the message names file, task and field."""

    status, code = 422, "invalid_catalogue"


class RateLimited(DetotError):
    """The key has used up its requests for this window."""

    status, code = 429, "rate_limit_exceeded"


class Overloaded(DetotError):
    """All admission permits are taken."""

    status, code = 429, "overloaded"


class ClientClosed(DetotError):
    """The client left before the answer was ready. Never sent, only counted."""

    status, code = 499, "client_closed_request"


class Unavailable(DetotError):
    """A dependency is down or the service is draining; try again later."""

    status, code = 503, "unavailable"


class StoreUnavailable(Unavailable):
    """Redis cannot be reached."""

    code = "store_unavailable"


class EngineUnavailable(Unavailable):
    """The engine is dead or failed its probe."""

    code = "engine_unavailable"


class DeadlineExceeded(DetotError):
    """The request's deadline passed before a single sample was finished."""

    status, code = 504, "deadline_exceeded"


class ConfigError(DetotError):
    """A setting is missing, of the wrong type or out of range; the message names it."""

    code = "invalid_setting"


class ModelError(DetotError):
    """A model cannot be fetched, verified or read; the message lists what was tried."""

    code = "model_unavailable"
