"""Kafka's jars, fetched by Maven once and kept in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

POM = Path(__file__).with_name("pom.xml")
INSTALL = "apt-get install maven default-jre-headless, or set PIPELINE_TEST_KAFKA=host:port to a running broker"
FETCH_S = 600.0


class Missing(Exception):
    """Reason why no broker can be started here, with what to install."""


def cache() -> Path:
    """Return the cache folder of this version's jars. Another pom.xml has another folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "delta-pipeline" / f"kafka-4.3.1-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}"


@contextmanager
def locked() -> Iterator[Path]:
    """Lock the cache folder, which may not exist yet, for this process alone."""
    folder = cache()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def need(program: str) -> str:
    """Return the path of a program; raise `Missing` if there is none."""
    path = shutil.which(program)
    if path is None:
        raise Missing(f"no {program}: {INSTALL}")
    return path


def jars() -> Path:
    """Return the folder with the jars, fetched if absent; raise `Missing` if that can't be done."""
    need("java")
    if not (cache() / "lib").is_dir():
        with locked() as folder:
            if not (folder / "lib").is_dir():
                _fetch(folder)
    return cache() / "lib"


def _fetch(folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    goal = ("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={part / 'lib'}")
    fetch([need("mvn"), "-q", "-B", "-f", str(POM), *goal], f"mvn could not fetch Kafka's jars ({INSTALL})")
    part.rename(folder)


def fetch(command: Sequence[str], failed: str) -> None:
    """Run a command that installs or fetches something; raise `Missing` with the end of its output if it fails."""
    try:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=FETCH_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"{failed}: {str(getattr(error, 'output', error))[-2000:]}") from None
