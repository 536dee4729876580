"""State machines as tables: which state follows from a state and a step."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from pipeline.errors import IllegalTransition

StateT = TypeVar("StateT", bound=Enum)
StepT = TypeVar("StepT", bound=Enum)


def next_state(transitions: Mapping[tuple[StateT, StepT], StateT], state: StateT, step: StepT, partition: int) -> StateT:
    """Return the state of a partition after a step. Raises `IllegalTransition` for a step that the table does not have."""
    try:
        return transitions[state, step]
    except KeyError:
        raise IllegalTransition(f"partition {partition}: {step.value} while {state.value}") from None
