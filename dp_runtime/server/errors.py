"""Errors as OpenAI's clients read them: a status, and a body that names the field at fault."""

from __future__ import annotations

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
    ContextExceeded,
    EngineClosed,
    QueueFull,
    RankFailed,
    RequestFailed,
    one_line,
    shown,
)

RETRY_AFTER_S = 1
MAX_MESSAGE = 2000
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
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
            case _:
                return "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        retry = self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        return {"Retry-After": str(RETRY_AFTER_S)} if retry else {}

    @property
    def body(self) -> dict[str, Any]:
        message = one_line(self.message, MAX_MESSAGE)
        entries = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": entries}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def refuse(field: str, value: object, allowed: str) -> ApiError:
    message = f"{field}: {shown(value)} is not allowed; {allowed}"
    return ApiError(HTTPStatus.BAD_REQUEST, message, field)


def as_api_error(error: BaseException) -> ApiError | None:
    """Say what a client is told of an engine's error; None for one that is a fault of ours."""
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
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), None, "request_failed")
        case QueueFull():
            return ApiError(HTTPStatus.TOO_MANY_REQUESTS, str(error), None, "queue_full")
        case RankFailed() | EngineClosed():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), None, "engine_failed")
    return None


def add_error_handlers(app: FastAPI) -> None:
    def answer(_: Request, error: Exception) -> JSONResponse:
        known = as_api_error(error)
        assert known is not None, "registered below"
        return known.response()

    for kind in (ApiError, ValueError, RequestFailed, QueueFull, RankFailed, EngineClosed):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for it"
    first = error.errors()[0]
    param = _path(first) or None
    message = f"{param or 'body'}: {first['msg']}"
    return ApiError(HTTPStatus.BAD_REQUEST, message, param).response()


def _path(error: Mapping[str, Any]) -> str:
    """The place of a mistake in the body, as `messages[1].content`."""
    if error["type"] == "json_invalid":
        return ""
    names: list[str] = []
    for part in error["loc"][1:]:
        if isinstance(part, int) and names:
            names[-1] += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier() and part not in _UNION_BRANCHES:
            names.append(part)
    return ".".join(names)


_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "dict", "list"})


def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for it"
    return ApiError(error.status_code, str(error.detail)).response()
