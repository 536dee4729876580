"""`pipeline dashboards export`: whoever installed a wheel gets the files of dashboards/."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from pipeline.cli.dashboards import FILES
from tests.support import ROOT, pipeline

FOLDER = ROOT / "dashboards"


def test_the_wheel_has_all_files() -> None:
    """The command exports every dashboard, the alerts and the scrape config, and the wheel has all of it."""
    assert {*FILES} == {path.name for pattern in ("*.json", "*.yml") for path in FOLDER.glob(pattern)}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = {it: to for it, to in wheel["force-include"].items() if it.startswith("dashboards/")}
    assert included == {f"dashboards/{name}": f"pipeline/_dashboards/{name}" for name in FILES}


def test_files_are_written(tmp_path: Path) -> None:
    """Files are as in the package; twice is fine; what differs is overwritten with --force only, and not in part."""
    to = tmp_path / "new" / "dashboards"
    for _ in range(2):
        done = pipeline("dashboards", "export", str(to))
        assert (done.returncode, done.stdout.splitlines()) == (0, [str(to / name) for name in FILES]), done.stderr
    assert all((to / name).read_bytes() == (FOLDER / name).read_bytes() for name in FILES)
    (to / "rules.yml").write_text("mine")
    (to / "health.json").unlink()
    refused = pipeline("dashboards", "export", str(to))
    assert refused.returncode == 2
    assert "rules.yml is there and differs" in refused.stderr
    assert not (to / "health.json").exists()
    base = "https://docs.example.org/p"
    assert pipeline("dashboards", "export", str(to), "--force", "--docs", base).returncode == 0
    assert f"runbook_url: {base}/operations.md#pipelinestale" in (to / "rules.yml").read_text()
    links = [panel.get("links", ()) for panel in json.loads((to / "health.json").read_text())["panels"]]
    assert {link["url"].partition("#")[0] for some in links for link in some} == {f"{base}/operations.md"}


def test_a_folder_that_can_not_be(tmp_path: Path) -> None:
    """A file in place of the folder is named, with exit code 2."""
    (tmp_path / "file").touch()
    done = pipeline("dashboards", "export", str(tmp_path / "file"))
    assert (done.returncode, "file" in done.stderr) == (2, True)
