"""The digest of the crate's sources. An extension has that of its own build, so that tests find a stale one."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def digest(folder: Path) -> str:
    """Return the digest of the Rust files in a folder and below."""
    whole = sha256()
    for path in sorted([folder / "Cargo.toml", *folder.glob("src/**/*.rs")]):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:16]
