"""Views and their definitions, seen to through a server."""

from __future__ import annotations

from urllib.parse import quote

import msgspec

from pipeline.adapters.http import HttpReader
from pipeline.core.answer import Changed, Status, known
from pipeline.core.record import Control
from pipeline.core.token import Token


class HttpViews(HttpReader):
    """A `roles.view_admin.Views` behind a server of this package."""

    def change(self, control: Control, key: str) -> Changed:
        """Give the order. With the same `key` it is safe to call again; `NotFound` if it is about nothing."""
        labels = None if control.labels is None else list(control.labels)
        path = f"/v1/views/{quote(control.view, safe='')}/{control.action}"
        body = msgspec.json.encode({"kind": control.kind or None, "labels": labels})
        return self._decoded(self.fetch(path, body=body, key=key), Changed)

    def folded(self, token: Token) -> bool:
        """Whether the server's own state holds what the token stands for."""
        states = {it.partition: it for it in self._get("/v1/status", Status, self._timeout_s).partitions}
        return all(
            number in states
            and states[number].topic_id == token.topic_id
            and (known(states[number].next_offset) or 0) >= next_offset
            for number, next_offset in token.next_offsets.items()
        )
