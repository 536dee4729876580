"""Ids of the owners of partitions: who has written a commit or a fence."""

from __future__ import annotations


def owner_id(app: str, partition: int, unique: str, name: str = "") -> str:
    """Return the id of one owner of a partition, with the name of its process if that has one.

    It begins with the partition, to detect records that were copied from another.
    """
    return f"{app}-{partition}:{unique}" + (f":{name}" if name else "")


def is_owner_of(partition: int, owner: str) -> bool:
    """Return whether an owner id is of this partition; the owner id of a position that is older than fences is empty."""
    return not owner or owner.partition(":")[0].endswith(f"-{partition}")


def owner_name(owner: str) -> str:
    """Return the name in an owner id; empty for a process without a name, and in ids of earlier versions."""
    return ":".join(owner.split(":")[2:])
