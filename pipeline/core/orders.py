"""Orders to drop or reset definitions of a view: what is one, and which definitions it is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.core.kinds import KIND_NAMES
from pipeline.core.record import CONTROL_ACTIONS, NAME, NAME_BYTES_MAX, Control
from pipeline.core.view import Listed, describe
from pipeline.errors import Invalid, NotFound


def order(action: str, view: str, kind: str | None, labels: Sequence[str] | None) -> Control:
    """The order to `drop` or `reset` a view's definitions of this kind, and with exactly these labels, in any order of
    theirs; None means any. Raises `Invalid` for what can be no order.
    """
    if action not in CONTROL_ACTIONS:
        raise Invalid(f"unknown action {action:.50}; known: {', '.join(CONTROL_ACTIONS)}")
    if not NAME.match(view) or len(view) > NAME_BYTES_MAX:
        raise Invalid(f"not the name of a view: {view[:NAME_BYTES_MAX]!r}")
    if kind is not None and kind not in KIND_NAMES:
        raise Invalid(f"unknown kind {kind[:50]!r}; known: {', '.join(KIND_NAMES)}")
    return Control(action, view, kind or "", None if labels is None else tuple(sorted(labels)))


def concerned(control: Control, known: Iterable[Listed]) -> list[Listed]:
    """Those of the known definitions that an order is about; `NotFound`, naming what there is, if that is none."""
    of_view = [it for it in known if it.definition.view == control.view]
    if not of_view:
        raise NotFound(f"no view {control.view}")
    found = [it for it in of_view if control.concerns(it.definition)]
    if not found:
        there = ", ".join(describe(it.definition) for it in of_view)
        raise NotFound(f"view {control.view} has no definition of this kind and these labels; it has {there}")
    return found
