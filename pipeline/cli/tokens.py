"""The commands of `pipeline tokens`, which change the file of access tokens that servers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from pipeline.cli.options import Json, Set, load

tokens = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

TokenName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the token: letters, digits, dots and dashes.")]
TokensPath = Annotated[
    str | None, typer.Option("--file", metavar="PATH", help="The file. Default: the setting tokens_file.")
]


@tokens.callback()
def main() -> None:
    """Add, list or revoke the access tokens of servers.

    A server whose setting tokens_file names the file answers only requests that have one of its tokens, and reads the file
    again within a second after it was changed. The file has no tokens in it, only digests of them.
    """


@tokens.command("add")
def add(
    name: TokenName,
    scopes: Annotated[list[str], typer.Option("--scope", metavar="SCOPE", help="read, publish or admin. Can be repeated.")],
    views: Annotated[
        list[str] | None,
        typer.Option(
            "--view", metavar="VIEW", help="Only this view, or with 'team_*' those that begin so. Can be repeated."
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="LABEL=VALUE", help="Only series with this label. Can be repeated."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="For how long it is good: 12h, 30d. Default: for ever.")
    ] = None,
    file: TokensPath = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Make a token, and print it: this once.

    \b
        pipeline tokens add grafana --scope read --file tokens.json
        pipeline tokens add shop --scope publish --expires 30d --file tokens.json
        pipeline tokens add team-a --scope read --scope publish --view 'shop_*' --label team=a --file tokens.json

    read: views, streams, scrapes, status. publish: deltas, batches, metrics. admin: drop or reset views, replay letters.
    Each scope stands for itself: a program that lists views and drops them needs read and admin. To rotate a token, add one
    with another name, give it to the program, and revoke the old one. A token with --view or --label sees and writes
    nothing else.
    """
    from pipeline.cli import console
    from pipeline.roles.tokens import new_token, tokens_file

    console.configure_logging(console.QUIET)
    entry, token = new_token(name, scopes, expires, views=views or (), labels=labels or ())
    tokens_file(load(set_), file).change(lambda known: [*known, entry])
    if json:
        console.print_json({"name": name, "token": token.reveal(), "expires_ms": entry.expires_ms})
    else:
        console.show(token.reveal())
        console.note("it is shown this once; a program takes it from PIPELINE_TOKEN_FILE or PIPELINE_TOKEN")


@tokens.command("ls")
def ls(file: TokensPath = None, set_: Set = None, json: Json = False) -> None:
    """List the tokens: names, what they allow, and until when.

    \b
        pipeline tokens ls --file tokens.json
    """
    from pipeline.cli import console
    from pipeline.cli.table import TextTable
    from pipeline.core.times import time_text
    from pipeline.roles.tokens import tokens_file

    console.configure_logging(console.QUIET)
    known = tokens_file(load(set_), file).read()
    if json:
        shown = [{field: getattr(it, field) for field in it.__struct_fields__ if field != "sha256"} for it in known]
        console.print_json({"tokens": shown})
        return
    table = TextTable("name", "scopes", "views", "labels", "created", "expires", right=())
    for it in known:
        labels = _joined([f"{label}={value}" for label, value in it.labels.items()])
        expires = "never" if it.expires_ms is None else time_text(it.expires_ms)
        cells = it.name, _joined(it.scopes), _joined(it.views) or "all", labels or "any", time_text(it.created_ms), expires
        table.add_row(*map(console.printable, cells))
    table.print()


def _joined(texts: Sequence[str]) -> str:
    return ", ".join(texts)


@tokens.command("revoke")
def revoke(name: TokenName, file: TokensPath = None, set_: Set = None, json: Json = False) -> None:
    """Take a token away: servers refuse it within a second, and end its streams.

    \b
        pipeline tokens revoke grafana --file tokens.json
    """
    from pipeline.cli import console
    from pipeline.roles.tokens import tokens_file, without

    console.configure_logging(console.QUIET)
    tokens_file(load(set_), file).change(lambda known: without(known, name))
    if json:
        console.print_json({"revoked": name})
    else:
        console.show(f"{name} is revoked")
