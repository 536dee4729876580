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


def with_offset(owner: str, offset: int) -> str:
    """Return an owner id that also says at which offset the position record stands that carries it.

    Such a record proves nothing at any other offset: somebody has copied it. Earlier versions read the id as any other.
    """
    place, unique, *name = owner.split(":")
    return ":".join([place, f"{unique}@{offset}", *name])


def is_placed_at(owner: str, offset: int) -> bool:
    """Return whether a position record with this owner id can stand at an offset; earlier versions named none."""
    _, at, place = ":".join(owner.split(":")[1:2]).partition("@")
    return not at or place == str(offset)


def owner_name(owner: str) -> str:
    """Return the name in an owner id; empty for a process without a name, and in ids of earlier versions."""
    return ":".join(owner.split(":")[2:])
