"""Orders to drop or reset views, as an HTTP server takes them: which definitions they are about, and what is answered."""

from __future__ import annotations

import threading

import msgspec

from pipeline.core.answer import Changed, View
from pipeline.core.query import concerned, order
from pipeline.core.record import Control
from pipeline.errors import Invalid
from pipeline.ports import Orders, RequestKey
from pipeline.query.problems import Refused
from pipeline.query.reader import ViewReader

_REMEMBERED_MAX = 1_000
_JSON = "application/json"


class DefinitionChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an order: which definitions of the view. `{}` is all of them."""

    kind: str | None = None
    labels: list[str] | None = None
    """Only definitions with exactly these labels, in any order."""


def parse_order(action: str, view: str, body: bytes, content_type: str) -> Control:
    """The order in a request. `Invalid` if it is none.

    A body that says what is JSON is needed even where it says nothing else: a page of another site can make a browser send
    anything but that without asking the server first.
    """
    if content_type.partition(";")[0].strip().lower() != _JSON:
        raise Refused(415, f'the body is {_JSON}: {{}}, or {{"kind": ..., "labels": [...]}} for some definitions only')
    try:
        choice = msgspec.json.decode(body, type=DefinitionChoice)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Invalid(f"the body is not JSON that chooses definitions: {error}") from None
    return order(action, view, choice.kind, choice.labels)


class OrderService:
    """Gives orders through `orders`, about views that `reader` knows. Safe from any thread."""

    def __init__(self, reader: ViewReader, orders: Orders) -> None:
        self._reader = reader
        self._orders = orders
        self._lock = threading.Lock()
        self._given: dict[RequestKey, Changed] = {}
        """What the newest requests with a key were answered: a view that was dropped is not there for their repeats."""

    def give(self, control: Control, key: RequestKey | None) -> Changed:
        """Put an order into the log, and say what it is about. `NotFound` if that is nothing."""
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
