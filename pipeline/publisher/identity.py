"""Who a producer is: a secret that only it knows, and an id, made from the secret, that everybody may see.

A gateway takes batches of an id only from whoever sends the secret with them (`check_owner`). On Kafka it is the
broker's permissions that say who may write.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from pipeline.ports import LogWriter


@runtime_checkable
class AsksForProof(Protocol):
    """A log that has to prove whose the batches are that it sends on."""

    def introduce(self, secret: str) -> None:
        """Batches of the producer with this secret will come."""
        ...

    def dismiss(self, secret: str) -> None:
        """No more of them will."""
        ...


def introduce(writer: LogWriter, secret: str) -> None:
    """Let a log know a producer's secret, if it has to prove it to somebody."""
    if isinstance(writer, AsksForProof):
        writer.introduce(secret)


def dismiss(writer: LogWriter, secret: str) -> None:
    """Undo `introduce`."""
    if isinstance(writer, AsksForProof):
        writer.dismiss(secret)
