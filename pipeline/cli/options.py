"""Command-line options that several commands share, and how they become settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import Invalid

if TYPE_CHECKING:
    from pipeline.config import Config

DEFAULT_URL = "http://127.0.0.1:8080"

Data = Annotated[str | None, typer.Option("--data", metavar="DIR", help="State folder: log, stores, lock.")]
Port = Annotated[int | None, typer.Option("--port", metavar="N", help="Port to listen on; 0 picks a free one.")]
Host = Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")]
To = Annotated[
    str,
    typer.Option("--to", metavar="URL", help="Where deltas go: http://host:port, kafka://host:port[/app] or embedded:DIR."),
]
From = Annotated[str, typer.Option("--from", metavar="URL", help="Where to read: http://host:port.")]
FromKafka = Annotated[str, typer.Option("--from", metavar="URL", help="The broker: kafka://host:port[,host:port...][/app].")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting by its name (README, Settings). Can be repeated."),
]
LogLevel = Annotated[str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log JSON lines, for machines.")]


def load(pairs: list[str] | None, **flags: Any) -> Config:
    """Settings from file, environment, `--set` pairs and flags, the later ones winning."""
    import pipeline.config as config  # pydantic takes its time, and not every command has settings

    given: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise Invalid(f"--set {pair}: NAME=VALUE is needed")
        name = name.strip()
        if name.startswith("kafka."):
            given.setdefault("kafka", {})[name.removeprefix("kafka.")] = value
        else:
            given[name] = value
    given.update({name: value for name, value in flags.items() if value is not None})
    return config.load(given)
