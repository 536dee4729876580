"""`pipeline worker -A MODULE:APP`: a wrong module or app is a usage error that says why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import pipeline as package
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.cli.agents import load_app
from pipeline.errors import Invalid
from tests.support import pipeline

MODULES = {
    "good_agents": "import pipeline\nclass inner:\n    app = pipeline.faust_app()\nnumber = 3",
    "raising_agents": "1 / 0",
    "leaving_agents": "raise SystemExit(7)",
    "needing_agents": "import nothing_of_that_name",
    "table_agents": "import pipeline\napp = pipeline.faust_app()\napp.Table('t')",
    "early_agents": "import pipeline\napp = pipeline.faust_app()\napp.publisher.sum('s').add(1)",
    "named_agents": "import pipeline\napp = pipeline.faust_app()\napp.changes('no name')",
    "strict_agents": "import pipeline\napp = pipeline.faust_app(on_error='retry')",
}
WRONG = {
    "good_agents": "MODULE:APP is needed, such as shop:app",
    "good_agents:": "MODULE:APP is needed, such as shop:app",
    "absent_agents:app": "no module absent_agents in ",
    "good_agents.deeper:app": "no module good_agents.deeper in ",
    "good_agents:nothing": "module good_agents has no nothing",
    "good_agents:number": "number is no pipeline.faust_app() but int",
    "raising_agents:app": "importing raising_agents failed: ZeroDivisionError",
    "leaving_agents:app": "importing leaving_agents failed: SystemExit(7)",
    "needing_agents:app": "importing needing_agents failed: ModuleNotFoundError",
    "table_agents:app": "a worker keeps no tables of Faust's",
    "early_agents:app": "deltas can be recorded once `pipeline worker -A` runs this app",
    "named_agents:app": "'no name' is no view's name",
    "strict_agents:app": "on_error: skip or stop, got 'retry'",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules in it."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [it for it in sys.path if it])
    return tmp_path


def test_an_app_is_found(here: Path) -> None:
    """An app is found from the current directory, also as an attribute of an attribute."""
    app = load_app("good_agents:inner.app")
    assert app.publisher.sum("s") is app.publisher.sum("s")


@pytest.mark.parametrize("where", WRONG)
def test_wrong_ones(here: Path, where: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(Invalid) as raised:
        load_app(where)
    assert WRONG[where] in str(raised.value)


def test_exit_code_and_traceback(here: Path) -> None:
    """The command exits 2; an error in a module's import is shown, with the line."""
    arguments = ("worker", "--from", "kafka://127.0.0.1:1", "--name", "one", "-A", "raising_agents:app")
    done = pipeline(*arguments, cwd=here)
    assert done.returncode == 2
    assert "raising_agents.py" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr


def test_agents_need_a_name(here: Path) -> None:
    """-A without --name is a usage error, before anything is imported or asked."""
    done = pipeline("worker", "--from", "kafka://127.0.0.1:1", "-A", "raising_agents:app", cwd=here)
    assert done.returncode == 2
    assert "agents need --name" in " ".join(done.stderr.split())
    assert "ZeroDivisionError" not in done.stderr


def test_changes_are_read_by_one_agent_in_order() -> None:
    """Two agents, or a concurrent one, can't share changes, which come in order and are done one by one."""
    app = package.faust_app()
    changes = app.changes("v")
    for name in ("one", "two"):
        app.agent(changes, name=name)(_read)
    with pytest.raises(Invalid, match="shares its changes with another"):
        app.changes_read()
    app = package.faust_app()
    app.agent(app.changes("v"), name="many", concurrency=2)(_read)
    with pytest.raises(Invalid, match="concurrency is 1"):
        app.changes_read()


def test_errors_are_counted_from_0() -> None:
    """Each topic and view that is read has a counter from 0: one that began at 1 would hide the first error from a rate."""
    app, metrics = package.faust_app(), PrometheusMetrics()
    app.agent(app.topic("orders"), name="one")(_read)
    app.agent(app.changes("v"), name="two")(_read)
    app.count_in(metrics)
    text = metrics.render()[0].decode()
    for labels in (
        'reason="raised",topic="orders"',
        'reason="undecodable",topic="orders"',
        'reason="raised",topic="changes of v"',
    ):
        assert f"pipeline_agent_errors_total{{{labels}}} 0.0" in text


async def _read(stream: object) -> None:
    """Do nothing: this agent never runs."""
