"""The commands of `pipeline topics`; what they do is in `plan`, which is imported when one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import Json, Set, load

topics = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Kafka = Annotated[str, typer.Option("--to", metavar="URL", help="The broker: kafka://host:port[,host:port...][/app].")]
Partitions = Annotated[
    int | None,
    typer.Option("--partitions", metavar="N", min=1, max=1024, help="Of all three topics; can grow, never shrink."),
]
Replication = Annotated[
    int, typer.Option("--replication-factor", metavar="N", help="Of new topics. Default: -1, the broker's default.")
]
InSync = Annotated[
    int | None,
    typer.Option("--min-insync-replicas", metavar="N", min=1, help="Replicas that hold what is acknowledged, at least."),
]
TopicLoss = Annotated[bool, typer.Option("--accept-loss", help="Let deltas be deleted earlier than they are now.")]


@topics.command("plan")
def topics_plan(
    to: Kafka,
    partitions: Partitions = None,
    replication_factor: Replication = -1,
    min_insync_replicas: InSync = None,
    accept_loss: TopicLoss = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Show what apply would do, and change nothing.

    \b
        pipeline topics plan --to kafka://127.0.0.1:9092
        pipeline topics plan --to kafka://127.0.0.1:9092/shop --partitions 8 --json

    One line for each setting that differs: what the broker has, what is wanted, and whether apply would create, alter or
    refuse it. Exit code 1 means that something would be refused; the line says what would follow from it.
    """
    from pipeline.adapters.kafka.plan import Wish
    from pipeline.cli.plan import run_plan

    wish = Wish(partitions, replication_factor, min_insync_replicas, accept_loss)
    raise SystemExit(run_plan(to, wish, load(set_), as_json=json))


@topics.command("apply")
def topics_apply(
    to: Kafka,
    partitions: Partitions = None,
    replication_factor: Replication = -1,
    min_insync_replicas: InSync = None,
    accept_loss: TopicLoss = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Create what is missing, alter what is safe.

    \b
        pipeline topics apply --to kafka://127.0.0.1:9092
        pipeline topics apply --to kafka://b1:9092,b2:9092/shop --replication-factor 3 --min-insync-replicas 2
        pipeline topics apply --to kafka://127.0.0.1:9092 --partitions 7

    If anything is not safe, nothing is changed, and its line says what would follow from it. Can be run at any time, while
    publishers and workers run, and by several at once. Partitions that are added are used from then on; nothing is
    replayed. For TLS or a login: --set kafka.security.protocol=SASL_SSL and so on. Exit code 1 means that something was
    refused, or that no broker answered within kafka_timeout_ms.
    """
    from pipeline.adapters.kafka.plan import Wish
    from pipeline.cli.plan import run_apply

    wish = Wish(partitions, replication_factor, min_insync_replicas, accept_loss)
    raise SystemExit(run_apply(to, wish, load(set_), as_json=json))
