"""`lora-serve key`: the file stays one that a server accepts, and that a person wrote."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lora_serve.api.caller import Caller, Limits
from lora_serve.api.key_file import KeyFile, hash_key
from lora_serve.cli import main


def add(file: Path, *arguments: str) -> int:
    return main(["key", "add", "--file", str(file), *arguments])


def test_a_key_that_was_added_is_accepted_by_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    assert add(file, "ci") == 0
    assert add(file, "ops", "--admin", "--metrics", "--share", "2", "--requests-per-minute", "60") == 0
    assert add(file, "poets", "--adapters", "poet", "--adapters", "poet-*", "--concurrent", "4") == 0
    keys = KeyFile(file)
    first, second, third = (keys.find(line) for line in capsys.readouterr().out.split())
    assert first == Caller("ci")
    assert second == Caller("ops", admin=True, metrics=True, share=2.0, limits=Limits(requests_per_minute=60))
    assert third == Caller("poets", adapters=("poet", "poet-*"), limits=Limits(concurrent=4))


def test_only_the_owner_may_read_a_new_file_and_the_mode_of_another_stays(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    add(file, "b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_comments_and_other_entries_stay_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    written = (
        f"# our customers\nacme: {hash_key('a')}  # since May\n\n"
        f"# and ourselves\nops: {{hash: '{hash_key('b')}', admin: true}}"
    )
    file.write_text(written)  # no line break at its end
    assert add(file, "new") == 0
    assert file.read_text().startswith(written + '\n"new":\n')
    assert main(["key", "revoke", "new", "--file", str(file)]) == 0
    assert file.read_text() == written + "\n"


def test_a_revoked_key_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "a")
    add(file, "b")
    first, second = capsys.readouterr().out.split()
    assert main(["key", "revoke", "a", "--file", str(file)]) == 0
    keys = KeyFile(file)
    assert keys.find(first) is None
    assert keys.find(second) == Caller("b")


def test_the_last_key_and_unknown_ones_are_not_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "a")
    assert main(["key", "revoke", "b", "--file", str(file)]) == 1
    assert main(["key", "revoke", "a", "--file", str(file)]) == 1
    said = capsys.readouterr().err
    assert "no key of b; there are: a" in said
    assert "the only key" in said
    assert len(file.read_text().splitlines()) == 2


def test_a_name_is_not_given_a_second_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "a")
    before = file.read_text()
    assert add(file, "a") == 1
    assert "has a key of a already" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "--adapters", "poet"], "metrics tell of all adapters"),
        (["--share", "0"], "key file: a.share"),
    ],
)
def test_what_a_server_would_refuse_is_not_written(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    assert add(file, "a", *arguments) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "- a list\n", "a: [", "a: sha256:short\n"])
def test_a_broken_file_is_left_alone(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    assert add(file, "a") == 1
    assert "key file" in capsys.readouterr().err
    assert file.read_text() == content


def test_keys_are_listed_with_what_they_may_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "ops", "--admin")
    add(file, "poets", "--adapters", "poet-*", "--tokens-per-minute", "10000")
    capsys.readouterr()
    assert main(["key", "list", "--file", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["ops", "yes", "no", "all", "1", "none", "none"],
        ["poets", "no", "no", "poet-*", "1", "10,000", "tokens", "per", "minute", "none"],
    ]


def test_the_file_may_be_named_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LORA_SERVE_API_KEY_FILE", raising=False)
    assert main(["key", "add", "a"]) == 1
    assert "--file" in capsys.readouterr().err
    monkeypatch.setenv("LORA_SERVE_API_KEY_FILE", str(tmp_path / "keys.yaml"))
    assert main(["key", "add", "a"]) == 0
    assert (tmp_path / "keys.yaml").exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(tmp_path / "nowhere" / "keys.yaml", "a") == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_commands_at_the_same_time_lose_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    command = [sys.executable, "-m", "lora_serve", "key", "add", "--file", str(file)]
    running = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "abcd"]
    keys = [process.communicate(timeout=60)[0].decode().strip() for process in running]
    assert {caller.name for key in keys if (caller := KeyFile(file).find(key))} == set("abcd")


@pytest.mark.parametrize("name", ["yes", "on", "True", "1", "1_0", "null", "2024-01-01"])
def test_a_name_is_the_text_that_was_given(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    assert add(file, "other") == add(file, name) == 0
    assert KeyFile(file).find(capsys.readouterr().out.split()[1]) == Caller(name)
    assert main(["key", "revoke", name, "--file", str(file)]) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_stays_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "a")
    os.chown(file, 1234, 1234)
    add(file, "b")
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 1234)
