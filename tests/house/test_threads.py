"""Every thread of the program has a base that an unexpected exception does not get past (DESIGN section 9)."""

from __future__ import annotations

import ast

from tests.house.test_tidy import modules

LOOPS = "pipeline/threads.py"
CHECKED = {
    "pipeline/adapters/bridge.py": "guarded: a look after a fork",
    "pipeline/adapters/faust/agents.py": "pool: its futures are awaited",
    "pipeline/adapters/faust/membership.py": "Faust's loop: all is caught and told as `on_failed`; its pool of calls alike",
    "pipeline/adapters/kafka/metadata.py": "guarded: one question",
    "pipeline/adapters/kafka/reader.py": "closes a consumer beside its reader, which no longer needs it",
    "pipeline/adapters/watch.py": "the next answer that is asked for raises what it fails with",
    "pipeline/cli/demo.py": "the demo: its threads report what they fail with",
    "pipeline/roles/service.py": "guarded: says that the role is ready",
    "pipeline/roles/statsd.py": "guarded: HTTP beside the sockets",
    "pipeline/roles/stopped.py": "guarded: the loop of a reader, whose calls say when it has ended",
    "pipeline/roles/supervisor.py": "reads standard input, and ends the process",
    "pipeline/roles/overview.py": "one question a member: what it fails with is the answer",
    "pipeline/publisher/async_flush.py": "flushes for coroutines, which raise what it fails with",
    "pipeline/publisher/client.py": "the publisher's own",
    "pipeline/publisher/runtime.py": "the publisher's own",
    "pipeline/publisher/spool/live.py": "work that is waited for: what it fails with is raised",
    "pipeline/query/api.py": "pool: its futures are awaited by requests",
    "pipeline/query/part_servers.py": "pool: its futures are awaited by requests",
    "pipeline/query/read_pool.py": "pool: its futures are awaited by requests",
    "pipeline/worker/commits.py": "pool: each future is looked at, or its failure noted",
    "pipeline/worker/active.py": "pool: each future is looked at, or its failure noted",
}
"""Places that make threads without `PeriodicThread`, and why none of these can end without a word."""


def test_threads_are_made_where_somebody_looks_at_them() -> None:
    """A new thread is a `PeriodicThread`, or wrapped by `guarded`; else it is put on the list with the reason."""
    found = set()
    for name, text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("Thread", "ThreadPoolExecutor", "start_new_thread"):
                    found.add(name)
    assert found == CHECKED.keys() | {LOOPS}
