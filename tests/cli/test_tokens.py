"""`pipeline tokens` changes the file of access tokens, and shows a token once."""

import json
import threading
from pathlib import Path

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.tokens_file import TokensFile
from pipeline.core.grants import ADMIN, READ, digest_of
from pipeline.roles.tokens import new_token
from tests.cli.conftest import Here


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_is_shown_once(here: Here, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`add` prints the token, whose digest alone is kept, in a file for its owner; `ls` shows all but the token."""
    added = here("tokens", "add", "grafana", "--scope", "read", "--scope", "admin", "--expires", "30d", "--file", str(file))
    token = added.stdout.strip()
    assert (added.returncode, len(token)) == (0, len("pipeline_") + 43)
    assert file.stat().st_mode & 0o777 == 0o600
    assert digest_of(token.encode()).hex() in file.read_text()
    monkeypatch.setenv("PIPELINE_TOKENS_FILE", str(file))
    listed = here("tokens", "ls", "--json")
    (entry,) = json.loads(listed.stdout)["tokens"]
    assert (entry["name"], entry["scopes"]) == ("grafana", ["read", "admin"])
    assert entry["expires_ms"] - entry["created_ms"] == 30 * 86_400_000
    shown = here("tokens", "ls", "--file", str(file)).stdout
    assert "grafana" in shown
    for text in (file.read_text(), listed.stdout, shown):
        assert token not in text


def test_a_token_is_bound(here: Here, file: Path) -> None:
    """Views and labels that a token is bound to are kept, and listed."""
    bound = ["--view", "team_*", "--view", "all_hits", "--label", "team=a", "--label", "zone=1=2"]
    assert here("tokens", "add", "a", "--scope", "publish", *bound, "--file", str(file)).returncode == 0
    (entry,) = json.loads(here("tokens", "ls", "--json", "--file", str(file)).stdout)["tokens"]
    assert (entry["views"], entry["labels"]) == (["team_*", "all_hits"], {"team": "a", "zone": "1=2"})
    assert "team_*, all_hits  team=a, zone=1=2" in here("tokens", "ls", "--file", str(file)).stdout


def test_a_revoked_token_is_gone(here: Here, file: Path) -> None:
    """`revoke` takes one away and leaves the others; a name that is not there is an error."""
    for name in ("a", "b"):
        added = json.loads(here("tokens", "add", name, "--scope", "read", "--file", str(file), "--json").stdout)
        assert added["token"].startswith("pipeline_")
    assert here("tokens", "revoke", "a", "--file", str(file)).returncode == 0
    assert [it.name for it in TokensFile(str(file), SystemClock()).read()] == ["b"]
    again = here("tokens", "revoke", "a", "--file", str(file))
    assert (again.returncode, "no token 'a'" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "a", "--scope", "root"], "of read, publish, admin"),
        (["add", "a b", "--scope", "read"], "a name has"),
        (["add", "a", "--scope", "read", "--expires", "soon"], "--expires"),
        (["add", "a", "--scope", "read", "--view", "team *"], "not the name of a view"),
        (["add", "a", "--scope", "read", "--label", "team"], "LABEL=VALUE"),
        (["add", "a", "--scope", "read", "--label", "team="], "belongs to everybody"),
        (["add", "a", "--scope", "read", "--label", "team=a", "--label", "team=b"], "once for a label"),
        (["add", "a", "--scope", "read", "--label", "__name__=a"], "not a label"),
        (["ls"], "No such file"),
    ],
)
def test_wrong_calls_change_nothing(here: Here, file: Path, arguments: list[str], said: str) -> None:
    """A wrong name, scope or time, or a file that is not there, is an error that says so."""
    done = here("tokens", *arguments, "--file", str(file))
    assert (done.returncode, said in done.stderr, file.exists()) == (2, True, False)


def test_a_file_is_needed(here: Here) -> None:
    """Without a file the commands say how to name one."""
    done = here("tokens", "ls")
    assert (done.returncode, "--file PATH" in done.stderr) == (2, True)


def test_a_name_is_given_once(here: Here, file: Path) -> None:
    """A second token of a name is refused, and the first one stays."""
    first = here("tokens", "add", "a", "--scope", "read", "--file", str(file))
    before = file.read_bytes()
    again = here("tokens", "add", "a", "--scope", "admin", "--file", str(file))
    assert (first.returncode, again.returncode, file.read_bytes() == before) == (0, 2, True)
    assert "one name" in again.stderr
    assert [*file.parent.iterdir()] == [file]


def test_changes_at_once_are_all_kept(file: Path) -> None:
    """Programs that change the file at the same time do so one after the other."""

    def add(number: int) -> None:
        entry, _ = new_token(f"t{number}", [READ, ADMIN])
        TokensFile(str(file), SystemClock()).change(lambda known: [*known, entry])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {it.name for it in TokensFile(str(file), SystemClock()).read()} == {f"t{number}" for number in range(8)}
