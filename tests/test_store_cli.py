"""`lora-serve store`: list, verify, export and import, on a store that a server may have open."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from first_format import make_first_format
from safetensors.torch import save_file
from store_files import listing, publish, stage

from lora_serve.adapters.store.records import AliasRecord, NameRecord, TargetRecord, describe_folder
from lora_serve.adapters.store.store import Store
from lora_serve.cli import main
from lora_serve.model.fingerprint import base_fingerprint

WEIGHTS = "adapter_model.safetensors"
PEFT_FILES = {"adapter_config.json", WEIGHTS, "README.md"}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("LORA_SERVE_STORE", raising=False)
    return tmp_path / "data" / "lora-serve" / "stores"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An open store with `poet`, of two versions, and `bard`."""
    store = Store(tmp_path / "store", base="1" * 64, model="llama")
    older = publish(store, "poet", "older")
    newer = publish(store, "bard", "newer")
    store.set_name("poet", NameRecord([newer, older], pinned=True))
    yield store
    store.close()


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A PEFT folder named `muse`."""
    folder = tmp_path / "muse"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / WEIGHTS).write_text("of muse")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "optimizer.pt").write_text("not kept")
    return folder


def root(store: Store) -> str:
    return str(store.staging.parent)


def digests(store: Store, name: str) -> list[str]:
    return store.names()[name].versions


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `lora-serve store …`."""
    status = main(["store", *map(str, arguments)])
    said = capsys.readouterr()
    assert said.err.count("\n") <= 1
    return status, said.out, said.err


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_shows_every_version_of_every_name(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    newer, older = digests(store, "poet")
    status, out, _ = run(capsys, "list", "--store", root(store))
    title, _, *rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert status == 0
    assert title == [f"{root(store)}, for llama (111111111111)"]
    assert [row[:3] for row in rows] == [
        ["bard", newer[:12], "0.0 kB"],
        ["poet", newer[:12], "0.0 kB"],
        ["poet", older[:12], "0.0 kB"],
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row[3]) for row in rows)
    assert [row[4:] for row in rows] == [[], ["pinned"], ["pinned"]]


def test_list_shows_what_is_broken_and_why(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.folder(digests(store, "bard")[0]) / WEIGHTS).unlink()
    (Path(root(store)) / "names" / "sage.json").write_text("")
    status, out, _ = run(capsys, "list", "--store", root(store))
    assert status == 0
    assert f"bard is broken: {WEIGHTS} is missing" in out
    assert f"poet is broken: {WEIGHTS} is missing" in out
    assert "sage is broken: sage.json is empty" in out


def test_the_environment_names_the_store(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SERVE_STORE", root(store))
    assert "bard" in run(capsys, "list")[1]


def test_the_only_store_is_the_default(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list")[::2] == (1, "lora-serve: there is no store; name one with --store or --model\n")
    Store(data / "one").close()
    assert str(data / "one") in run(capsys, "list")[1]
    Store(data / "two").close()
    status, _, said = run(capsys, "list")
    assert status == 1
    assert said == f"lora-serve: there are 2 stores: {data / 'one'}, {data / 'two'}; name one with --store or --model\n"


def test_a_base_has_its_default_store(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, base / "model.safetensors")
    Store(data / "whatever", base=base_fingerprint(str(base), None)).close()
    Store(data / "other").close()
    assert str(data / "whatever") in run(capsys, "list", "--model", base)[1]
    status, _, said = run(capsys, "list", "--model", tmp_path)
    assert (status, "cannot be identified" in said) == (1, True)


@pytest.mark.parametrize("command", [["list"], ["verify"], ["export", "poet", "out"]])
def test_what_is_not_a_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    make_first_format(tmp_path / "old")
    for folder, complaint in {
        "nowhere": "is not there",
        "mine": "is not an adapter store",
        "file": "is not a folder",
        "old": "has format 1; a server upgrades it",
    }.items():
        status, out, said = run(capsys, *command, "--store", tmp_path / folder)
        assert (status, out) == (1, "")
        assert complaint in said
        assert str(tmp_path / folder) in said


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_an_intact_store_intact(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", "--store", root(store)) == (0, f"2 adapters in {root(store)} are intact\n", "")


def test_verify_prints_one_line_per_problem(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    newer, older = digests(store, "poet")
    (store.folder(newer) / "adapter_config.json").write_text('{"lora_alpha": 9}')
    (store.folder(older) / WEIGHTS).write_text("cut")
    (Path(root(store)) / "names" / "sage.json").write_text("")
    status, out, said = run(capsys, "verify", "--store", root(store))
    assert status == 1
    assert out.splitlines() == [
        f"bard@{newer[:12]}: adapter_config.json has been altered",
        f"poet@{newer[:12]}: adapter_config.json has been altered",
        f"poet@{older[:12]}: {WEIGHTS} has 3 bytes instead of 5",
        "sage: sage.json is empty",
    ]
    assert said == f"lora-serve: 4 problems, in 3 adapters of {root(store)}\n"


def test_reading_changes_nothing(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(root(store)) / "names" / "stray").write_text("")
    store.stage()
    before = listing(Path(root(store)))
    for command in (["list"], ["verify"], ["export", "poet", tmp_path / "out"]):
        assert run(capsys, *command, "--store", root(store))[0] == 0
    assert listing(Path(root(store))) == before


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_copies_the_files_as_they_came(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer, older = digests(store, "poet")
    for adapter, digest in (("poet", newer), (f"poet@{older[:6]}", older)):
        out = tmp_path / "parent" / adapter
        status, said, _ = run(capsys, "export", adapter, out, "--store", root(store))
        assert (status, said) == (0, f"poet@{digest[:12]} → {out}\n")
        assert listing(out) == PEFT_FILES
        assert describe_folder(out).digest == digest


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [("sage", "adapter sage does not exist"), ("poet@xyz", "has no version xyz"), ("../poet", "does not exist")],
)
def test_export_of_what_is_not_there_is_refused(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: str, complaint: str
) -> None:
    status, _, said = run(capsys, "export", adapter, tmp_path / "out", "--store", root(store))
    assert status == 1
    assert complaint in said
    assert not (tmp_path / "out").exists()


def test_export_overwrites_nothing(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for target in (tmp_path / "out", tmp_path / "out" / "mine"):
        status, _, said = run(capsys, "export", "poet", target, "--store", root(store))
        assert (status, "is not an empty folder" in said) == (1, True)
    assert listing(tmp_path / "out") == {"mine"}


def test_export_says_that_the_copy_is_damaged(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer, older = digests(store, "poet")
    (store.folder(newer) / WEIGHTS).write_text("other")
    (store.folder(older) / WEIGHTS).unlink()
    for adapter, complaint in (("poet", "altered"), (f"poet@{older}", "missing")):
        status, _, said = run(capsys, "export", adapter, tmp_path / adapter, "--store", root(store))
        assert status == 1
        assert f"{WEIGHTS} {'has been ' if complaint == 'altered' else 'is '}{complaint}" in said


# --- import ----------------------------------------------------------------------------------------------------------


def test_import_adds_peft_folders_which_the_server_lowers_later(
    peft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "import", peft, "--store", tmp_path / "new")[:2] == (0, "muse: imported\n")
    assert run(capsys, "import", peft, "--store", tmp_path / "new")[:2] == (0, "muse: is there already\n")
    assert run(capsys, "import", peft, "--name", "sage", "--store", tmp_path / "new")[:2] == (0, "sage: imported\n")
    store = Store(tmp_path / "new")
    assert store.names().keys() == {"muse", "sage"}
    (digest,) = digests(store, "muse")
    store.verify(digest)
    assert listing(store.folder(digest)) == {"version.json", "adapter_config.json", WEIGHTS}
    assert len(store.version(digest).vocabulary) == 64
    assert not store.lowered(digest).exists()
    assert listing(store.staging) == set()
    store.close()
    assert (peft / "optimizer.pt").exists()


def test_import_replaces_only_when_told_to(store: Store, peft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.close()
    newer, older = digests(store, "poet")
    status, out, said = run(capsys, "import", peft, "--name", "poet", "--store", root(store))
    assert (status, out) == (1, "poet: adapter poet exists with other files; --replace replaces it\n")
    assert said == "lora-serve: not imported: 1 of 1 adapter\n"
    assert run(capsys, "import", peft, "--name", "poet", "--replace", "--store", root(store))[0] == 0
    again = Store(Path(root(store)))
    assert again.names()["poet"] == NameRecord([describe_folder(peft).digest])
    assert not again.folder(older).exists()
    again.verify(newer)  # bard's
    again.close()


def test_import_takes_all_of_another_store(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(root(store)) / "names" / "sage.json").write_text("")
    status, out, said = run(capsys, "import", root(store), "--store", tmp_path / "new")
    assert (status, said) == (1, "lora-serve: not imported: 1 of 3 adapters\n")
    assert out.splitlines() == ["bard: imported", "poet: imported", "sage: sage.json is empty"]
    new = Store(tmp_path / "new")
    assert new.names() == store.names()
    for digest in digests(store, "poet"):
        new.verify(digest)
        assert new.version(digest) == store.version(digest)
    new.close()


def test_import_takes_a_store_with_a_damaged_marker_and_one_of_format_1(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(root(store)) / "lora-serve-store.json").write_text("")
    make_first_format(tmp_path / "old")
    status, *_ = run(capsys, "import", root(store), tmp_path / "old", "--store", tmp_path / "new")
    assert status == 0
    new = Store(tmp_path / "new")
    assert new.names().keys() == {"poet", "bard", "a", "also-a", "b"}
    assert (new.folder(digests(new, "a")[0]) / WEIGHTS).read_text() == "of a"
    assert new.broken == {}
    new.close()


def test_import_takes_nothing_that_is_damaged_or_unsafe(
    store: Store, peft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = digests(store, "poet")[0]
    (store.folder(newer) / WEIGHTS).write_text("other")
    (peft / WEIGHTS).rename(tmp_path / "weights")
    (peft / WEIGHTS).symlink_to(tmp_path / "weights")
    status, out, _ = run(capsys, "import", root(store), peft, "--store", tmp_path / "new")
    assert status == 1
    assert out.splitlines() == [
        f"bard: version {newer[:12]} has been altered",
        f"poet: version {newer[:12]} has been altered",
        f"muse: {WEIGHTS} is a link",
    ]
    new = Store(tmp_path / "new")
    assert new.names() == {}
    assert listing(tmp_path / "new" / "versions") == set()
    new.close()


def test_import_refuses_a_store_of_another_base(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(tmp_path / "new", base="2" * 64).close()
    status, _, said = run(capsys, "import", root(store), "--store", tmp_path / "new")
    assert status == 1
    assert "has adapters of another base model (fingerprint 111111111111, not 222222222222)" in said


def test_import_needs_a_store_that_no_server_has_open(
    store: Store, peft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = run(capsys, "import", peft, "--store", root(store))
    assert status == 1
    assert "a server has the adapter store" in said
    assert "stop it, or use: lora-serve adapter upload" in said


@pytest.mark.parametrize("folder", ["nowhere", "", "muse/adapter_config.json"])
def test_import_of_something_else_is_refused(
    peft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    status, _, said = run(capsys, "import", tmp_path / folder, "--store", tmp_path / "new")
    assert status == 1
    assert "is neither a PEFT folder nor an adapter store" in said


def test_a_stage_that_was_left_by_a_server_is_not_imported(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(store, "unfinished")
    run(capsys, "import", root(store), "--store", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "lora-serve-store.json").read_text())["format"] == 2
    assert len([*(tmp_path / "new" / "versions").iterdir()]) == 2


# --- aliases ---------------------------------------------------------------------------------------------------------


def alias(store: Store, name: str = "prod") -> tuple[str, str]:
    """Let a name stand for an older version of `poet`, and for `bard`."""
    newer, older = digests(store, "poet")
    store.set_alias(name, AliasRecord([TargetRecord("poet", older, 95.0), TargetRecord("bard", weight=5.0)], "user"))
    return newer, older


def test_list_and_verify_know_aliases(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _, older = alias(store)
    assert f"prod → poet@{older[:12]} (95), bard (5), by user" in run(capsys, "list", "--store", root(store))[1]
    intact = f"2 adapters and 1 alias in {root(store)} are intact\n"
    assert run(capsys, "verify", "--store", root(store))[:2] == (0, intact)
    (Path(root(store)) / "names" / "bard.json").unlink()
    (Path(root(store)) / "aliases" / "test.json").write_text("")
    assert "alias test is broken: test.json is empty" in run(capsys, "list", "--store", root(store))[1]
    status, out, said = run(capsys, "verify", "--store", root(store))
    assert out.splitlines() == ["alias prod: bard is not in the store", "alias test: test.json is empty"]
    assert (status, said) == (1, f"lora-serve: 2 problems, in 2 aliases of {root(store)}\n")


def test_export_of_an_alias_names_what_can_be_exported(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, older = alias(store)
    status, _, said = run(capsys, "export", "prod", tmp_path / "out", "--store", root(store))
    assert (status, said) == (1, f"lora-serve: prod is an alias, of poet@{older}, bard: export one of these\n")


def test_import_takes_the_aliases_of_another_store(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alias(store)
    alias(store, "test")
    (Path(root(store)) / "aliases" / "more.json").write_text("")
    status, out, said = run(capsys, "import", root(store), "--store", tmp_path / "new")
    assert out.splitlines() == [
        "bard: imported", "poet: imported", "alias prod: imported", "alias test: imported",
        "alias more: more.json is empty",
    ]  # fmt: skip
    assert (status, said) == (1, "lora-serve: not imported: 1 of 2 adapters and 3 aliases\n")
    new = Store(tmp_path / "new")
    assert (new.names(), new.aliases()) == (store.names(), store.aliases())
    new.close()
    assert "alias prod: is there already" in run(capsys, "import", root(store), "--store", tmp_path / "new")[1]


def test_import_replaces_an_alias_only_when_told_to_and_none_by_an_adapter(
    store: Store, peft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alias(store)
    new = Store(tmp_path / "new")
    publish(new, "sage", "of sage")
    new.set_alias("prod", AliasRecord([TargetRecord("sage")]))
    new.close()
    assert "alias prod: it exists" in run(capsys, "import", root(store), "--store", tmp_path / "new")[1]
    assert run(capsys, "import", root(store), "--store", tmp_path / "new", "--replace")[0] == 0
    said = run(capsys, "import", peft, "--name", "prod", "--store", tmp_path / "new")[1]
    assert said == "prod: prod is an alias\n"


def test_replacing_an_adapter_keeps_the_version_that_an_alias_names(
    store: Store, peft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, older = alias(store)
    store.close()
    assert run(capsys, "import", peft, "--name", "poet", "--replace", "--store", root(store))[0] == 0
    again = Store(Path(root(store)))
    assert again.names()["poet"].versions == [describe_folder(peft).digest, older]
    again.verify(older)
    again.close()
