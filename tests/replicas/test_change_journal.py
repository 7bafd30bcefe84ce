"""The journal of changes: what is kept of them in a folder, and what is refused or told when it cannot be."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from lora_serve.errors import PartlyApplied, StorageFull, StoreUnusable
from lora_serve.replicas.change_journal import ChangeJournal, default_journal, journal_of, not_kept
from lora_serve.replicas.compaction import KeptChange
from lora_serve.replicas.forwarding import ForwardedRequest


def keep(journal: ChangeJournal, thing: str, method: str = "PUT", body: bytes = b"", *names: str) -> KeptChange:
    headers = (("Content-Type", "multipart/form-data; boundary=b"), ("Authorization", "Bearer sk-secret"))
    return journal.keep(journal.begin(body), thing, ForwardedRequest(method, thing, headers, body), names)


def test_the_journal_keeps_changes_in_order_and_gives_their_bodies(tmp_path: Path) -> None:
    journal, reader = ChangeJournal(tmp_path), ChangeJournal(tmp_path)
    first = keep(journal, "/v1/adapters/x", "PUT", b"one\ntwo\x00", "x@1")
    second = keep(journal, "/v1/adapters/y", "PUT", b"", "y@1")
    assert reader.read() == [first, second]
    assert reader.body(first) == b"one\ntwo\x00"
    last = keep(journal, "/v1/adapters/x", "DELETE")
    with pytest.raises(FileNotFoundError):
        reader.body(first)  # it read the list before
    assert reader.read() == [second, last]
    assert last.request(b"").change == last.number
    assert len(list(tmp_path.iterdir())) == 2 * 2 + 1  # bodies and heads, and the last number


def test_the_journal_has_no_keys_and_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    change = keep(ChangeJournal(folder), "/v1/adapters/x")
    assert change.headers == (("content-type", "multipart/form-data; boundary=b"),)
    assert not any(b"sk-secret" in path.read_bytes() for path in folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0


def test_what_was_begun_and_not_made_is_no_change_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    journal = ChangeJournal(tmp_path)
    number = journal.begin(b"refused by all")
    journal.abandon(number)
    killed = journal.begin(b"its ingress was killed")
    assert ChangeJournal(tmp_path).read() == []
    (tmp_path / "000000000009.change.0123456789abcdef0123456789abcdef").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("somebody's")
    kept = keep(journal, "/v1/adapters/x")
    assert number < killed < kept.number
    names = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    assert names == {"last", "notes", f"{kept.number:012d}"}


def test_nothing_is_changed_that_the_journal_cannot_keep(tmp_path: Path) -> None:
    journal = ChangeJournal(tmp_path)
    (tmp_path / "last").mkdir()  # the number cannot be written
    with pytest.raises(StoreUnusable, match="nothing was changed"):
        journal.begin(b"")
    assert isinstance(not_kept(OSError(errno.ENOSPC, "No space left on device")), StorageFull)


def test_a_change_that_was_made_and_not_kept_is_told(tmp_path: Path) -> None:
    journal = ChangeJournal(tmp_path)
    number = journal.begin(b"")
    (tmp_path / f"{number:012d}.change").mkdir()
    with pytest.raises(PartlyApplied, match=r"was made, but could not be kept .* send it again"):
        journal.keep(number, "/v1/adapters/x", ForwardedRequest("PUT", "/v1/adapters/x"))


def test_a_changes_file_and_its_name_are_on_the_disk_when_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(_is_folder(descriptor)))
    journal = ChangeJournal(tmp_path)
    number = journal.begin(b"body")
    assert False in synced
    journal.keep(number, "/v1/adapters/x", ForwardedRequest("PUT", "/v1/adapters/x"))
    assert synced[-1]


def _is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


def test_changes_are_made_one_after_the_other(tmp_path: Path) -> None:
    def write(number: int) -> None:
        journal = ChangeJournal(tmp_path)
        with journal.lock():
            keep(journal, f"/v1/adapters/{number}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [change.number for change in ChangeJournal(tmp_path).read()] == list(range(1, 9))


def test_each_model_and_each_application_has_a_journal_of_its_own(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
    models = [str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"), "owner/model"]
    folders = {default_journal(tmp_path, model) for model in models}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path and folder.name.startswith("model-") for folder in folders)
    assert default_journal(tmp_path, f"{models[0]}/../model") == default_journal(tmp_path, models[0])
    assert len({journal_of(tmp_path, name) for name in ("default", "other", "a/b", "..")}) == 4
    assert all(journal_of(tmp_path, name).parent == tmp_path for name in ("a/b", "..", "."))
