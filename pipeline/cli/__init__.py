"""The command line: where settings, adapters and roles are joined. `app` is the list of commands."""

from __future__ import annotations

import sys


def main() -> None:
    """The `pipeline` program."""
    try:
        from pipeline.cli.app import run

        run()  # commands import what they need when they run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pipeline"):
            raise
        print(
            f"pipeline: {error.name} is not installed: the programs need the server extra,"
            " pip install 'delta-pipeline[server]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
