"""`Secret` and the texts that hold none: whatever shows an object must not show the text in it."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import traceback
from pathlib import Path

import msgspec
import pytest

from pipeline.errors import Invalid
from pipeline.secret import Secret, is_secret_option, read_secret, redacted_url, revealed, with_secrets

PLANTED = "pl4nted-\u00e9"


def test_a_secret_is_never_shown() -> None:
    """No way to show or to store an object shows a secret; only `reveal` returns the text."""
    secret = Secret(PLANTED)
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s %r", (secret, [secret]), None)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", f"{secret:.3}", f"{[secret]}", record.getMessage()]
    shown += [repr(traceback.FrameSummary("f", 1, "f", locals={"secret": secret}).locals)]
    assert not any(PLANTED[:3] in text for text in shown)
    for dump in (pickle.dumps, json.dumps, msgspec.json.encode, msgspec.msgpack.encode, msgspec.to_builtins):
        with pytest.raises(TypeError) as error:
            dump(secret)
        assert PLANTED not in str(error.value)
    assert copy.copy(secret) is secret
    assert copy.deepcopy({"a": secret})["a"].reveal() == secret.reveal() == PLANTED
    assert secret == Secret(secret) != Secret("other")
    assert secret != PLANTED
    assert not Secret()
    assert str(Secret()) == ""
    with pytest.raises(Invalid, match="a secret is a text"):
        Secret(12)  # type: ignore[arg-type]


def test_a_secret_from_a_file(tmp_path: Path) -> None:
    """A file gives its text without the last line break; whatever is no small regular file is refused, by its path."""
    file = tmp_path / "password"
    file.write_text(f"{PLANTED}\n")
    (tmp_path / "link").symlink_to(file)
    assert read_secret(tmp_path / "link", "token_file").reveal() == PLANTED
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff" * 9)
    (tmp_path / "large").write_bytes(b"a" * 70_000)
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "empty", "bytes", "large", "fifo", "gone"):
        with pytest.raises(Invalid, match=rf"^token_file='.*{name}': "):
            read_secret(tmp_path / name, "token_file")


def test_options_that_hold_secrets(tmp_path: Path) -> None:
    """Options of librdkafka become secrets by name or as URLs with a password; files and secrets become texts again."""
    (tmp_path / "p").write_text(PLANTED)
    given = {"sasl.password": PLANTED, "sasl.username": "u", "ssl.key.location": "/k", "x.url": "http://u:p@h", "n": 1}
    held = with_secrets(given)
    assert [name for name, value in held.items() if isinstance(value, Secret)] == ["sasl.password", "x.url"]
    assert PLANTED not in repr(held)
    assert revealed(held) == given
    assert revealed({"ssl.key.password_file": str(tmp_path / "p")}) == {"ssl.key.password": PLANTED}
    with pytest.raises(Invalid, match="both given"):
        revealed({**held, "sasl.password_file": "/p"})
    for name in ("ssl.key.pem", "sasl.oauthbearer.client.secret", "ssl.keystore.password", "sasl.oauthbearer.config"):
        assert is_secret_option(name)
    for name in ("ssl.ca.pem", "ssl.certificate.pem", "sasl.oauthbearer.client.id", "sasl.oauthbearer.token.endpoint.url"):
        assert not is_secret_option(name)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("kafka://u:p@h:1,u:p@g:2/app", "kafka://***@g:2/app"),
        ("http://u:p/q?r@h:1", "http://***@h:1"),
        ("u:p@h", "***@h"),
        ("http://h:1/?token=p", "http://h:1/?***"),
        ("http://h:1/path", "http://h:1/path"),
    ],
)
def test_a_url_without_its_password(url: str, shown: str) -> None:
    """A URL is shown without what stands before its last `@`, and behind its `?`."""
    assert redacted_url(url) == shown
