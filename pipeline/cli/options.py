"""Command-line options that several commands share, and how they become settings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import Invalid
from pipeline.secret import FILE_SUFFIX, is_secret_option

if TYPE_CHECKING:
    from pipeline.config import Config

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
DEFAULT_URL = "http://127.0.0.1:8080"


def _check_pairs(pairs: list[str] | None) -> list[str] | None:
    """Raise `Invalid` if a setting holds a secret: everybody on this machine can read a command line."""
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        _check_public(name.strip(), value)
    return pairs


def _check_public(name: str, value: str) -> None:
    from pipeline.settings import ENV_PREFIX, SECRETS

    option = name.removeprefix("kafka.")
    if name in SECRETS:
        other = f"the variable {ENV_PREFIX}{name.upper()} or a file, --set {name}{FILE_SUFFIX}=PATH"
    elif option != name and is_secret_option(option, value):
        other = f"a file, --set {name}{FILE_SUFFIX}=PATH, or in the table kafka of the settings file"
    else:
        return
    raise Invalid(f"--set {name}: a command line can be read by everybody on this machine; give the secret in {other}")


Data = Annotated[str | None, typer.Option("--data", metavar="DIR", help="State folder: log, stores, lock.")]
Port = Annotated[int | None, typer.Option("--port", metavar="N", help="Port to listen on; 0 picks a free one.")]
Host = Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")]
TlsCert = Annotated[
    str | None, typer.Option("--tls-cert", metavar="FILE", help="Speak TLS, with the certificate in this file.")
]
TlsKey = Annotated[str | None, typer.Option("--tls-key", metavar="FILE", help="Its key. Default: in the same file.")]
TlsClientCa = Annotated[
    str | None,
    typer.Option("--tls-client-ca", metavar="FILE", help="Answer only clients with a certificate of these authorities."),
]
Insecure = Annotated[
    bool | None, typer.Option("--insecure", help="Listen beyond loopback without access tokens: whoever comes may do all.")
]
To = Annotated[
    str,
    typer.Option("--to", metavar="URL", help="Where deltas go: http://host:port, kafka://host:port[/app] or embedded:DIR."),
]
From = Annotated[str, typer.Option("--from", metavar="URL", help="Where to read: http://host:port.")]
ReadFrom = Annotated[
    str,
    typer.Option(
        "--from", metavar="URL", help="Where to read: http://host:port, or embedded:DIR of a `pipeline up` that was stopped."
    ),
]
StatusFrom = Annotated[
    str, typer.Option("--from", metavar="URL", help="Which process: http://host:port; or all: kafka://host:port[/app].")
]
FromKafka = Annotated[str, typer.Option("--from", metavar="URL", help="The broker: kafka://host:port[,host:port...][/app].")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting by its name (pipeline docs settings), but no secret. Can be repeated.",
        callback=_check_pairs,
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Share the partitions with other workers, each of a NAME of its own."),
]
Standbys = Annotated[
    int | None,
    typer.Option("--standbys", metavar="N", min=0, help="With --name: copies of each partition kept warm. Default: 1."),
]
Agents = Annotated[
    str, typer.Option("-A", "--app", metavar="MODULE:APP", help="With --name: run the agents of this pipeline.faust_app().")
]
Static = Annotated[
    bool, typer.Option("--static/--no-static", help="With --name: back within session_timeout_ms, it has what it had.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="N",
        min=1,
        max=256,
        help="Run N workers: NAME-0, NAME-1... in DIR/0, DIR/1... on PORT, PORT + 1... Default of NAME: this host's.",
    ),
]
AcceptLoss = Annotated[
    bool | None,
    typer.Option("--accept-loss", help="Go on without records that are lost; the better copy is kept."),
]
LogLevel = Annotated[str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log JSON lines, for machines.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("delta-pipeline"))
        except PackageNotFoundError:
            print("not installed")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
]


def listening(
    port: int | None,
    host: str | None,
    insecure: bool | None,
    tls_cert: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
) -> dict[str, Any]:
    """Return the settings of a command's HTTP server that its flags give."""
    tls = {"tls_cert_file": tls_cert, "tls_key_file": tls_key, "tls_client_ca_file": tls_client_ca}
    return {"port": port, "host": host, "insecure": insecure, **tls}


def check_group(
    name: str | None, *, processes: int | None, agents: str = "", standbys: int | None = None, static: bool = True
) -> None:
    """Raise `Invalid` if this is no name, or if there is none and no `processes` and an option has no meaning without."""
    if name is not None and not _NAME.fullmatch(name):
        raise Invalid(f"--name {name:.100}: 1 to 100 letters, digits, dots, dashes and underscores are needed")
    if name is not None or processes:
        return
    if agents:
        raise Invalid(f"-A {agents:.100}: agents need --name (or --processes): their topics are shared by a group")
    if standbys is not None or not static:
        option = "--no-static" if standbys is None else "--standbys"
        raise Invalid(f"{option}: --name (or --processes) is needed: a worker without is in no group")


def parse_partitions(text: str | None) -> list[int] | None:
    """Return the numbers of `0,2,5-7`; None for None and for `all`."""
    if text is None or text.strip() == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise Invalid(f"--partitions {text:.100}: numbers and ranges are needed, such as 0,2,5-7, or all")
        numbers += range(int(first), min(int(last or first), int(first) + 100_000) + 1)
    if not numbers:
        raise Invalid(f"--partitions {text:.100}: no partition is in it")
    return numbers


def load(pairs: list[str] | None, **flags: Any) -> Config:
    """Settings from file, environment, `--set` pairs and flags, the later ones winning."""
    import pipeline.config as config  # pydantic takes its time, and not every command has settings

    given: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise Invalid("--set: NAME=VALUE is needed, and there is no =")
        name = name.strip()
        if name.startswith("kafka."):
            given.setdefault("kafka", {})[name.removeprefix("kafka.")] = value
        else:
            given[name] = value
    given.update({name: value for name, value in flags.items() if value is not None})
    return config.load(given)
