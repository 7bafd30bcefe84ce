"""Finding the adapter among other files, and saying what is there instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_serve.adapter_files import MOST_FILES, choose_folder, describe_missing, find_adapter
from lora_serve.cli import main
from lora_serve.errors import AdapterInvalid

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_bytes(b"")
    return folder


def test_the_outermost_adapter_counts_and_one_further_inside_is_found(tmp_path: Path) -> None:
    inner = adapter(tmp_path / "run" / "output" / "checkpoint-80")
    assert find_adapter(inner) == inner
    assert find_adapter(tmp_path / "run") == inner
    outer = adapter(tmp_path / "run2")
    adapter(outer / "checkpoint-80")
    assert find_adapter(outer) == outer


def test_several_adapters_are_named_to_choose_from(tmp_path: Path) -> None:
    for step in (80, 160):
        adapter(tmp_path / f"checkpoint-{step}")
    with pytest.raises(
        AdapterInvalid, match=r"2 adapters, in checkpoint-160, checkpoint-80: give one of these folders"
    ):
        find_adapter(tmp_path)


def test_folders_are_searched_no_deeper_and_no_longer_than_is_sensible(tmp_path: Path) -> None:
    adapter(tmp_path / "a" / "b" / "c" / "d" / "e")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json is missing"):
        find_adapter(tmp_path)
    for n in range(MOST_FILES + 1):
        (tmp_path / f"{n}").touch()
    with pytest.raises(AdapterInvalid, match="more than 10000 files"):
        find_adapter(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], f"{CONFIG} is missing"),
        (["config.json", "model.safetensors"], "as in a whole model"),
        ([CONFIG], f"{WEIGHTS} is missing"),
        ([CONFIG, "training_args.bin", "optimizer.pt"], f"{WEIGHTS} is missing"),
        ([CONFIG, "adapter_model.bin", "training_args.bin"], "adapter_model.bin would run code when read: save"),
        ([CONFIG, "pytorch_lora_weights.safetensors"], "there is pytorch_lora_weights.safetensors"),
    ],
)
def test_what_is_missing_is_said_with_what_is_there_instead(names: list[str], said: str) -> None:
    assert said in describe_missing(names)
    with pytest.raises(AdapterInvalid, match=said.partition(":")[0]):
        choose_folder(names)


@pytest.mark.parametrize("command", ["upload", "inspect"])
def test_the_command_line_says_the_same_before_it_sends_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = adapter(tmp_path / "poet")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert main(["adapter", command, str(folder), "--url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "adapter_model.bin would run code when read" in said
    assert "safe_serialization=True" in said


def test_the_folder_of_adapters_must_exist_and_not_be_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "poet")
    assert main(["serve", "m", "--adapters", str(folder)]) == 2
    assert f"--adapters: {folder} is itself an adapter: give the folder that it is in, {tmp_path}" in (
        capsys.readouterr().err
    )
    assert main(["serve", "m", "--adapters", str(tmp_path / "none")]) == 2
    assert "--adapters: there is no folder" in capsys.readouterr().err
