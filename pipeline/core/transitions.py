"""State machines as tables: the state that follows from a state and an event."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from pipeline.errors import IllegalTransition

StateT = TypeVar("StateT", bound=Enum)
StepT = TypeVar("StepT", bound=Enum)


def next_state(transitions: Mapping[tuple[StateT, StepT], StateT], state: StateT, step: StepT, partition: int) -> StateT:
    """Return the state of a partition after an event. Raises `IllegalTransition` if the table does not have the event."""
    try:
        return transitions[state, step]
    except KeyError:
        raise IllegalTransition(f"partition {partition}: {step.value} while {state.value}") from None
