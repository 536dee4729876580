"""`pipeline docs`: prints the pages behind the README, which are in the package."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from pipeline.errors import Invalid


def docs(page: Annotated[str, typer.Argument(metavar="[PAGE]", help="The page to print. Default: list them.")] = "") -> None:
    """List the pages of the documentation, or print one.

    \b
        pipeline docs
        pipeline docs operations | less
    """
    folder = resources.files("pipeline") / "docs"
    pages = {it.name.removesuffix(".md"): it for it in folder.iterdir() if it.name.endswith(".md")}
    if not page:
        for name in sorted(pages):
            title = pages[name].read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            print(f"{name:13} {title}")
    elif page in pages:
        print(pages[page].read_text(encoding="utf-8"), end="")
    else:
        raise Invalid(f"there is no page {page!r:.100}; there are {', '.join(sorted(pages))}")
