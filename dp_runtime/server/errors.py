"""Errors as OpenAI's clients read them: a status, and a body that names the field at fault."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dp_runtime.errors import (
    MAX_SHOWN,
    ContextExceeded,
    EngineClosed,
    EngineOverloaded,
    RankFailed,
    RankMissing,
    RequestFailed,
    ResizeFailed,
    one_line,
    shown,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
LATE = "request_timeout"
MAX_MESSAGE = 2000
FORM = "structured_outputs"  # the field that a request may fail by after its check
FAULT = "a fault of the server, which its log has"
_FIELD = re.compile(r"(?:prompts\[\d+\]: )?([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): ")


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal with its status; `param` is the field at fault."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def kind(self) -> str:
        match self.status:
            case 401:
                return "authentication_error"
            case 404:
                return "not_found_error"
            case 408:
                return "timeout_error"
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
            case _:
                return "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.SERVICE_UNAVAILABLE:
                return {"Retry-After": str(RETRY_AFTER_S)}
            case _ if self.code == LATE:  # by the client's own limit; OpenAI's client reads this
                return {"X-Should-Retry": "false"}
        return {}

    @property
    def body(self) -> dict[str, Any]:
        message = one_line(self.message, MAX_MESSAGE)
        param = None if self.param is None else one_line(self.param, MAX_SHOWN)
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def refuse(field: str, value: object, allowed: str) -> ApiError:
    message = f"{field}: {shown(value)} is not allowed; {allowed}"
    return ApiError(HTTPStatus.BAD_REQUEST, message, field)


def as_api_error(error: Exception) -> ApiError:
    """Say what a client is told of an error; one that is a fault of ours is for the log."""
    match error:
        case ApiError():
            return error
        case ContextExceeded():
            code = "context_length_exceeded"
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), error.field, code)
        case ValueError():
            found = _FIELD.match(str(error))
            param = found[1] if found else None
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), param)
        case RequestFailed():
            param = FORM if f": {FORM}: " in str(error) else None
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), param, "request_failed")
        case EngineOverloaded():
            return ApiError(HTTPStatus.TOO_MANY_REQUESTS, str(error), None, "engine_overloaded")
        case ResizeFailed():
            return ApiError(HTTPStatus.CONFLICT, str(error), None, "resize_failed")
        case RankMissing():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "dp_rank", "rank_missing")
        case RankFailed() | EngineClosed():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), None, "engine_failed")
    logger.error("a fault of this server, which a client was told of by 500", exc_info=error)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, FAULT)


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors in this format; the handlers are async, for others run in threads."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (
        ApiError,
        ValueError,
        RequestFailed,
        EngineOverloaded,
        RankFailed,
        RankMissing,
        EngineClosed,
        ResizeFailed,
    ):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for it"
    errors = error.errors()
    # Of a field of several types, the others say only that it is none of theirs.
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    param = _path(first) or None
    reason = first["msg"]
    if first["type"] == "json_invalid":
        reason = f"no JSON: {first['ctx']['error']} at character {first['loc'][1]}"
    elif isinstance(error.body, bytes):
        reason = "it is read as JSON where the header says content-type: application/json"
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param or 'body'}: {reason}", param).response()


def _path(error: Mapping[str, Any]) -> str:
    """The place of a mistake in the body, as `messages[1].content`."""
    if error["type"] == "json_invalid":
        return ""
    where, *path = error["loc"]
    if where == "header":
        return str(path[0])
    names: list[str] = []
    for part in path:
        if isinstance(part, int) and names:
            names[-1] += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier() and part not in _UNION_BRANCHES:
            names.append(part)
    return ".".join(names)


_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "dict", "list"})


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for it"
    message = str(error.detail)
    if error.__cause__ is not None:  # of reading a body as JSON: not UTF-8, too deep, huge numbers
        message = f"body: no JSON: {error.__cause__}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response
