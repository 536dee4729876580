"""uWSGI with a publisher on Kafka: nothing of it runs before the fork, and after it the workers are exact."""

from pathlib import Path

from pipeline.topics import DELTAS
from tests.broker.kafka import App, create_topics
from tests.broker.log import fold, raw_records
from tests.publisher.test_uwsgi import GRACEFUL, needed, serve

pytestmark = needed


def test_its_workers_are_exact(app: App, tmp_path: Path, free_port: int) -> None:
    """The master has a connection before the fork, and one of its children sends the deltas that wait there.

    A bridge begins there, too.
    """
    create_topics(app.bootstrap, app.app, 2)
    with serve(tmp_path, free_port, "--master", *GRACEFUL, kafka=app.url) as server:
        count = server.ask(2)
        server.end()
    assert "threads: MainThread\n" in server.output(), server.output()
    assert fold(raw_records(app.bootstrap, app.topic(DELTAS))).totals == {
        ("v", "/"): count,
        ("v", "all"): count,
        ("boot",): 11,
        ("asked_total",): count + 1,
    }
