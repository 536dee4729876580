"""The command `pipeline dashboards export`: dashboards, alerts and scrape config, which are in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import console
from pipeline.errors import Invalid
from pipeline.secret import redacted_url

FILES = ("health.json", "worker.json", "publishers.json", "kafka.json", "views.json", "rules.yml", "prometheus.yml")
_DOCS = "pipeline/docs/"

dashboards = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@dashboards.callback()
def main() -> None:
    """Write dashboards for Grafana, and alerts for Prometheus."""


def folder() -> Path:
    """Return the folder of the files: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    return package / "_dashboards" if (package / "_dashboards").is_dir() else package.parent / "dashboards"


@dashboards.command("export")
def export(
    to: Annotated[Path, typer.Argument(metavar="DIR", help="The folder; it is made if it is not there.")],
    docs: Annotated[
        str, typer.Option("--docs", metavar="URL", help="Where your copy of the docs is; links to the runbook lead there.")
    ] = _DOCS,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that differ.")] = False,
) -> None:
    """Write five dashboards, the alerts and a scrape config into a folder.

    \b
        pipeline dashboards export ./dashboards
        pipeline dashboards export ./dashboards --docs https://wiki.example.org/pipeline/

    The *.json are for Grafana (8 or newer): import them, or let a provider of type `file` read the folder. rules.yml and
    prometheus.yml are for Prometheus. Panels and alerts link to the runbook, which `pipeline docs operations` prints.
    Nothing is written if a file is there and differs, unless --force is given.
    """
    if "@" in docs.partition("?")[0]:
        raise Invalid(f"--docs {redacted_url(docs)}: the dashboards would show the password")
    base = docs if docs.endswith("/") else f"{docs}/"
    wanted = {to / name: (folder() / name).read_text("utf-8").replace(_DOCS, base) for name in FILES}
    try:
        to.mkdir(parents=True, exist_ok=True)
        different = [path for path, text in wanted.items() if path.exists() and path.read_bytes() != text.encode()]
        if different and not force:
            raise Invalid(f"{different[0]} is there and differs: --force overwrites it")
        for path, text in wanted.items():
            path.write_text(text, "utf-8")
            console.show(str(path))
    except OSError as error:
        raise Invalid(f"{error.filename}: {error.strerror}") from None
