"""Errors as HTTP answers: RFC 9457 problem JSON, which reveals nothing of the server's inside."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from pipeline.errors import (
    BadRecord,
    BufferFull,
    CursorGone,
    Fenced,
    Forbidden,
    GroupsForbidden,
    GroupsRefused,
    Invalid,
    NewerFormat,
    NotFound,
    NotReady,
    OtherTopic,
    PipelineError,
    Unauthenticated,
    Unavailable,
)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
_DETAIL_LENGTH_MAX = 2_000

_TITLES: Mapping[type[PipelineError], tuple[int, str]] = {
    Unauthenticated: (401, "Send an access token"),
    Forbidden: (403, "The access token does not allow it"),
    GroupsForbidden: (403, "The access token does not allow some groups of a batch"),
    OtherTopic: (409, "The token is of another topic"),
    CursorGone: (410, "Begin again with the first page"),
    NotFound: (404, "Nothing of this name is known"),
    Invalid: (400, "Fix the request"),
    BadRecord: (400, "Not a valid batch"),
    GroupsRefused: (400, "Some groups of a batch can't be taken"),
    NotReady: (503, "The state does not hold it yet"),
    Unavailable: (503, "Try again"),
    BufferFull: (503, "Slow down"),
    NewerFormat: (500, "Start a newer version of this server"),
    Fenced: (503, "Another server has taken over"),
}


class WrongGroup(msgspec.Struct):
    """A group of a batch that can't be taken."""

    group: int
    """Index in the batch, from 0."""
    view: str
    reason: str


class Problem(msgspec.Struct, omit_defaults=True):
    """The body of an error's answer."""

    type: str
    title: str
    status: int
    detail: str
    batch: int | None = None
    """Index in the request, from 0, of a batch of which only some groups can't be taken."""
    groups: list[WrongGroup] = []
    """The groups that can't be taken: the batch can be sent without them, under the same sequence."""


class Refused(Exception):
    """An error with an HTTP status of its own, such as 413."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


class ProblemAnswer(msgspec.Struct):
    """Status, headers and body of an error's answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    detail: str


def problem(error: Exception) -> ProblemAnswer:
    """Return the answer for `error`: with its text if it is a `PipelineError` or `Refused`, else without."""
    if isinstance(error, Refused):
        return _answer(
            Problem(f"urn:pipeline:http:{error.status}", HTTPStatus(error.status).phrase, error.status, error.detail),
            error.headers,
        )
    for kind in type(error).__mro__:
        if kind in _TITLES:
            status, title = _TITLES[kind]
            said = Problem(f"urn:pipeline:error:{kind.__name__}", title, status, str(error))
            if isinstance(error, GroupsRefused):
                said.batch, said.groups = error.batch, [WrongGroup(*group) for group in error.groups]
            return _answer(said, _challenge(error))
    return _answer(Problem("about:blank", HTTPStatus(500).phrase, 500, "an error in the server; its log says more"), {})


def _challenge(error: Exception) -> dict[str, str]:
    """Return the header by which RFC 6750 tells a client which access token to send."""
    said = ['realm="pipeline"']
    if isinstance(error, Forbidden) and error.scope:
        said += ['error="insufficient_scope"', f'scope="{error.scope}"']
    elif not isinstance(error, Unauthenticated):
        return {}
    elif error.reason != "missing":
        said.append('error="invalid_token"')
    return {"WWW-Authenticate": f"Bearer {', '.join(said)}"}


def _answer(it: Problem, headers: dict[str, str]) -> ProblemAnswer:
    if it.status == 503:
        headers = {"Retry-After": str(RETRY_AFTER_S), **headers}
    it.detail = it.detail[:_DETAIL_LENGTH_MAX].encode("utf-8", "replace").decode()
    return ProblemAnswer(it.status, {"Content-Type": MEDIA_TYPE, **headers}, msgspec.json.encode(it), it.detail)
