"""Errors as answers: problem+json (RFC 9457), with the words of the command and without paths of this machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import to_json

from nucleus.errors import (
    AccessDeniedError,
    DataError,
    IntegrityError,
    JobError,
    MissingPackageError,
    ModelError,
    NucleusError,
    ObjectNotFoundError,
    OutputError,
    RequestError,
    StorageError,
    TransientStorageError,
    UsageError,
)
from nucleus.lazy import fastapi
from nucleus.storage.files import failed_write

if TYPE_CHECKING:
    from starlette.exceptions import HTTPException

__all__ = ["PROBLEM", "add_problems", "problem_of", "without_paths"]

PROBLEM = "application/problem+json"
"""Media type of errors."""
_LATER = 5
_STATUS: tuple[tuple[type[NucleusError], int], ...] = (
    (ObjectNotFoundError, 404),
    (AccessDeniedError, 403),
    (TransientStorageError, 503),
    (StorageError, 502),
    (IntegrityError, 502),
    (JobError, 404),  # no run of this name can be read
    (OutputError, 507),
    (MissingPackageError, 501),
    (ModelError, 422),
    (DataError, 422),
    (UsageError, 400),
)
"""Status of each kind of error; the first that fits."""
_PATH = re.compile(r"(?<![\w:/.~])(?:[A-Za-z]:[\\/]|~?/)(?:[^\s,;:'\"\\/]+[\\/])*[^\s,;:'\"\\/]+")
_MOST_WORDS = 4000
_SAID = {"extra_forbidden": "an unknown option {}", "missing": "no {}", "json_invalid": "a body that is no JSON"}
"""What is found by kinds of errors of pydantic and FastAPI, whose own words would not say it."""

_log = logging.getLogger("nucleus.serve")


def without_paths(text: str) -> str:
    """Return a message in which paths of this machine are reduced to their last part; addresses stay.

    >>> without_paths("Expected 10 free bytes in /var/tmp to unpack a.tif, or s3://bucket/a/b.")
    'Expected 10 free bytes in tmp to unpack a.tif, or s3://bucket/a/b.'
    """
    return _PATH.sub(lambda found: PurePath(found[0].replace("\\", "/")).name, text)


def problem_of(error: NucleusError) -> fastapi.Response:
    """Return the answer to a request that raised an error of this project."""
    if isinstance(error, RequestError):
        later = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _problem(error.status, str(error), later)
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return _problem(status, without_paths(str(error)), {"Retry-After": str(_LATER)} if status == 503 else {})


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> fastapi.Response:
    title = HTTPStatus(status).phrase
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail[:_MOST_WORDS]}
    return fastapi.Response(to_json(content), status, dict(headers or {}), PROBLEM)


def add_problems(app: fastapi.FastAPI) -> None:
    """Have an application answer every error as problem+json."""
    from starlette.exceptions import HTTPException  # noqa: PLC0415  of the extra `serve`, with FastAPI

    app.add_exception_handler(NucleusError, _ours)
    app.add_exception_handler(OSError, _of_system)
    app.add_exception_handler(fastapi.exceptions.RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(_request: fastapi.Request, error: Exception) -> fastapi.Response:
    assert isinstance(error, NucleusError)
    answer = problem_of(error)
    if answer.status_code >= 500:
        _log.warning("%s", " ".join(str(error).split()))
    return answer


async def _of_system(request: fastapi.Request, error: Exception) -> fastapi.Response:
    """Answer that a file cannot be written, as on a full disk; other errors of the system are the service's own."""
    found = failed_write(error)
    if found is None:
        raise error
    return await _ours(request, found)


async def _invalid(_request: fastapi.Request, error: Exception) -> fastapi.Response:
    """Answer a query or a body that is not as the API describes it."""
    assert isinstance(error, fastapi.exceptions.RequestValidationError)
    found = "; ".join(_said(each) for each in error.errors())
    return _problem(400, f"Expected a request as /openapi.json describes it; found {found}. Correct it.")


def _said(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][-1]) if error["loc"] else "body"
    if error["type"] in _SAID:
        return _SAID[error["type"]].format(repr(name))
    return f"{name}={str(error.get('input'))[:80]!r} ({str(error['msg'])[:1].lower()}{error['msg'][1:]})"


async def _of_http(request: fastapi.Request, error: Exception) -> fastapi.Response:
    """Answer what the framework raises: no such address, another method, a body that it cannot parse."""
    raised = cast("HTTPException", error)
    if isinstance(raised.__cause__, RequestError):  # of a body that is parsed while it is read
        return problem_of(raised.__cause__)
    said = str(raised.detail).rstrip(".")
    detail = {
        404: f"Expected an address of /openapi.json; found {request.url.path[:200]!r}.",
        405: f"Expected another method for {request.url.path[:200]!r}; found {request.method}. See /openapi.json.",
        400: f"Expected a body as its Content-Type says; found another ({said}). Correct one of them.",
    }.get(raised.status_code, f"Expected a request as /openapi.json describes it; found: {raised.detail} Correct it.")
    return _problem(raised.status_code, detail, raised.headers)


async def _unexpected(_request: fastapi.Request, _error: Exception) -> fastapi.Response:
    """Answer an error of the service itself, whose traceback the server logs."""
    return _problem(500, "Expected an answer; found an error of the service itself. Its log says more.")
