"""The commands of `pipeline views`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import DEFAULT_URL, Json, Set, load

if TYPE_CHECKING:
    from pipeline.core.answer import View
    from pipeline.roles.view_admin import ControlOutcome

views = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

ViewsFrom = Annotated[
    str, typer.Option("--from", metavar="URL", help="A server, http://host:port, or a broker, kafka://host:port[/app].")
]
ViewsTo = Annotated[
    str,
    typer.Option(
        "--to", metavar="URL", help="A server that takes deltas, http://host:port, or a broker, kafka://host:port[/app]."
    ),
]
ViewName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the view.")]
Kind = Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Only its definitions of this kind.")]
Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar="A,B", help="Only its definitions with exactly these labels; '' is those without."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask on a terminal.")]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="S", min=0, help="How long to try, and to wait until it is done, in seconds.")
]


@views.callback()
def main() -> None:
    """See which views there are; drop or reset one.

    A view can have several definitions: apps that publish it with other labels, or another kind, each make one. Their series
    lie side by side, and a read merges those of one kind and window.
    """


@views.command("ls")
def ls(url: ViewsFrom = DEFAULT_URL, timeout_s: Timeout = 60.0, set_: Set = None, json: Json = False) -> None:
    """List every definition of every view.

    \b
        pipeline views ls
        pipeline views ls --from kafka://127.0.0.1:9092 --json

    With its kind, labels and window, how many series it has, when it was first published, and whether a read merges it that
    chooses no kind and window (the kind and window that were first do). From a broker all of the changelog is read, which
    takes a second for some hundred thousand series; a server knows.
    """
    from pipeline.cli import console
    from pipeline.roles.view_admin import open_views

    console.configure_logging("error")
    config = load(set_)
    with closing(open_views(url, config.kafka, config.publisher, config.client, timeout_s=timeout_s)) as found:
        definitions = found.views()
    if json:
        console.print_json({"views": definitions})
    else:
        _print(definitions)
    raise SystemExit(console.OK)


@views.command("drop")
def drop(
    name: ViewName,
    url: ViewsTo = DEFAULT_URL,
    kind: Kind = None,
    labels: Labels = None,
    yes: Yes = False,
    timeout_s: Timeout = 60.0,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Delete a view: its definitions and all their series.

    \b
        pipeline views drop requests
        pipeline views drop requests --kind sum --labels path,region --to kafka://127.0.0.1:9092

    The order goes through the log, as deltas do: each partition carries it out once, between two batches. What the log had
    before it is gone. What publishers send after it defines the view anew, and counts from zero: they need not be stopped,
    but a view that somebody still publishes does not stay away.

    Waits until it is done. The token that is printed stands for the order: `pipeline get NAME --after TOKEN` waits for it
    too, at any server. Exit code 1: not done within --timeout; it may be done later. To run the command again is another
    order: what was published since the first one goes, too. Exit code 2: there is no such view.
    """
    raise SystemExit(_change("drop", name, url, kind, labels, yes, timeout_s, set_, json))


@views.command("reset")
def reset(
    name: ViewName,
    url: ViewsTo = DEFAULT_URL,
    kind: Kind = None,
    labels: Labels = None,
    yes: Yes = False,
    timeout_s: Timeout = 60.0,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Delete a view's series, and keep its definitions.

    \b
        pipeline views reset requests
        pipeline views reset requests --kind sum --labels path,region --yes

    As `drop`, but the view stays, empty: reads answer with no series, and which of its definitions answers does not change.
    Publishers go on, and count from zero.
    """
    raise SystemExit(_change("reset", name, url, kind, labels, yes, timeout_s, set_, json))


def _change(
    action: str,
    name: str,
    url: str,
    kind: str | None,
    labels: str | None,
    yes: bool,
    timeout_s: float,
    set_: list[str] | None,
    as_json: bool,
) -> int:
    from pipeline.adapters.clock import SystemClock
    from pipeline.cli import console
    from pipeline.core.query import order
    from pipeline.roles.view_admin import about, change, open_views

    console.configure_logging("error")
    names = None if labels is None else [it.strip() for it in labels.split(",") if it.strip()]
    control, config = order(action, name, kind, names), load(set_)
    with closing(open_views(url, config.kafka, config.publisher, config.client, timeout_s=timeout_s)) as found:
        if not yes and sys.stdin.isatty() and (known := about(control, found)) and not _is_sure(action, name, known):
            return console.FAILED
        outcome = change(found, control, timeout_s=timeout_s, clock=SystemClock())
    if as_json:
        console.print_json(outcome)
    else:
        _print_outcome(outcome)
    return console.OK if outcome.folded else console.FAILED


def _is_sure(action: str, name: str, definitions: list[View]) -> bool:
    from pipeline.cli import console

    for it in definitions:
        console.note(f"  {_text(it)}")
    return typer.confirm(f"{action} {console.printable(name)}: {_counted(definitions)}?", err=True)


def _print_outcome(outcome: ControlOutcome) -> None:
    from pipeline.cli import console

    done = {"drop": "dropped", "reset": "reset"}[outcome.action]
    for it in outcome.definitions:
        console.show(f"  {console.printable(_text(it))}")
    console.show(f"{done} {console.printable(outcome.view)}: {_counted(outcome.definitions)}")
    if outcome.token:
        console.show(f"token {outcome.token}")
    if not outcome.folded:
        console.print_error("the log has the order, but it is not carried out in all partitions yet; --timeout waits longer")


def _counted(definitions: list[View]) -> str:
    from pipeline.core.answer import known

    series = sum(known(it.series_count) or 0 for it in definitions)
    return f"{len(definitions):,} definition{'s' * (len(definitions) != 1)} with {series:,} series"


def counted(it: View) -> str:
    """Return the number of series of a definition; empty if the server has not told it."""
    from pipeline.core.answer import known

    count = known(it.series_count)
    return "" if count is None else f"{count:,}"


def _text(it: View) -> str:
    window = f" in windows of {it.window_s} s" if it.window_s else ""
    window += f" kept for {it.retention_s} s" if it.retention_s else ""
    return f"{'monotone ' * it.monotone}{it.kind}({', '.join(it.labels)}){window}: {counted(it)} series"


def _print(definitions: list[View]) -> None:
    from pipeline.cli import console
    from pipeline.cli.table import TextTable

    table = TextTable("view", "kind", "labels", "window", "retention", "defined", "answers", right=("series",))
    for it in definitions:
        window, retention = (f"{seconds} s" if seconds else "" for seconds in (it.window_s, it.retention_s))
        kind = "monotone " * it.monotone + it.kind
        row = (
            it.name,
            kind,
            ", ".join(it.labels),
            window,
            retention,
            console.utc(it.defined_at_ms),
            "yes" if it.answers else "no",
        )
        table.add_row(*map(console.printable, row), counted(it))
    table.print()
    names = {it.name for it in definitions}
    console.show(
        f"{len(names):,} view{'s' * (len(names) != 1)}, {len(definitions):,} definition{'s' * (len(definitions) != 1)}"
    )
