"""The systemd unit is valid, confined, and stops as slowly as the server drains."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_serve.config import ServeConfig

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "lora-serve.service"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/lora-serve/bin/lora-serve", "/bin/true"))  # something that is there
    done = analyze("verify", str(copy))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_exposure_is_low() -> None:
    done = analyze("security", "--offline=true", "--threshold=20", str(UNIT))  # of 100
    assert done.returncode == 0, done.stdout


def test_it_waits_for_the_drain_and_five_seconds_more() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.read(UNIT)
    drain = ServeConfig.model_fields["drain_timeout"].default
    assert parser.getint("Service", "TimeoutStopSec") >= drain + 5
