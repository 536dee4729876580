"""Requests to drop or reset views: parsed into control records, and appended to the log."""

from __future__ import annotations

import threading

import msgspec

from pipeline.core.answer import Changed, View
from pipeline.core.grants import Bounds
from pipeline.core.query import concerned, order
from pipeline.core.record import Control
from pipeline.errors import Forbidden, Invalid
from pipeline.ports import Orders, RequestKey
from pipeline.query.reader import ViewReader

_REMEMBERED_MAX = 1_000


class DefinitionChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a drop or reset: the definitions of the view; `{}` stands for all."""

    kind: str | None = None
    labels: list[str] | None = None
    """Only definitions with exactly these labels, in any order."""


def parse_control(action: str, view: str, body: bytes) -> Control:
    """Return the control record that a request asks for; `Invalid` if there is none."""
    try:
        choice = msgspec.json.decode(body, type=DefinitionChoice)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Invalid(f"the body is not JSON that chooses definitions, such as {{}} for all: {error}") from None
    return order(action, view, choice.kind, choice.labels)


class ControlService:
    """Appends control records about views that `reader` knows. Safe from any thread."""

    def __init__(self, reader: ViewReader, orders: Orders) -> None:
        self._reader = reader
        self._orders = orders
        self._lock = threading.Lock()
        self._given: dict[RequestKey, Changed] = {}
        """Answers to the newest requests with a key, for repeats: by then the view of a drop is gone."""

    def give(self, control: Control, key: RequestKey | None, bounds: Bounds | None = None) -> Changed:
        """Append a control record and return the definitions that it concerns; `NotFound` if there are none.

        Raises `Forbidden` for an access token that is bound to labels: the view has series of others.
        """
        if bounds is not None and bounds.labels:
            raise Forbidden(f"{control.action}: a view goes as a whole; the access token is bound to some of its series")
        if bounds is not None and not bounds.has_view(control.view):
            concerned(control, ())  # raises, as for a view that is not there
        given = self._given.get(key) if key is not None else None
        definitions = given.definitions if given is not None else self._concerned(control)
        token = self._orders.controls([control], key)
        changed = Changed(control.action, control.view, definitions, str(token))
        if key is not None:
            with self._lock:
                self._given[key] = changed
                while len(self._given) > _REMEMBERED_MAX:
                    del self._given[next(iter(self._given))]
        return changed

    def _concerned(self, control: Control) -> list[View]:
        return [View.of(it) for it in concerned(control, self._reader.definitions()[0])]
