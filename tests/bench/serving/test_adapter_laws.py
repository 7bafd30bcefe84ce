"""The command of the adapter laws reports every law, those that fail too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.report import Goal, goal_table
from bench.serving.adapter_laws import main, measure
from bench.serving.adapter_server import Scale, Workspace, upload_form
from bench.serving.adapter_sets import WEIGHTS, AdapterMaker
from bench.serving.throughput_laws import Figures
from bench.shapes import SHAPES


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    maker = AdapterMaker(SHAPES["tiny"], tmp_path / "adapters")
    return Workspace(Path("model"), tmp_path, maker, torch.bfloat16, (), 2048, Scale(10, 2, 1, 1.0, clients=4))


def met(workspace: Workspace) -> tuple[list[Goal], Figures]:
    return [Goal(4, "one", 1.0, 0.97, "2 ÷ 2")], {"seconds": [2.0]}


def failing(workspace: Workspace) -> tuple[list[Goal], Figures]:
    raise RuntimeError("the server ended")


def test_a_law_that_fails_does_not_lose_the_others(workspace: Workspace) -> None:
    goals, figures = measure(workspace, {5: failing, 4: met})
    assert [(goal.number, goal.met) for goal in goals] == [(5, False), (4, True)]
    assert math.isnan(goals[0].value)
    assert figures["failing"]["error"] == "the server ended"
    assert figures["met"]["seconds"] == [2.0]
    assert "failing" in goal_table(goals)


def test_common_adapters_are_made_once(workspace: Workspace) -> None:
    folder = workspace.make_common()
    names = [*workspace.rank8, *workspace.rank16, *workspace.rank128]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    made = [(folder / name / WEIGHTS).stat() for name in names]
    workspace.make_common()
    assert [(folder / name / WEIGHTS).stat() for name in names] == made


def test_an_upload_is_a_form_of_the_name_and_all_files(workspace: Workspace) -> None:
    folder = workspace.maker.make("a", 4)
    form = upload_form("name", folder)
    boundary = form[2 : form.index(b"\r\n")]
    parts = form.split(b"--" + boundary)
    assert parts[1].endswith(b'name="name"\r\n\r\nname\r\n')
    for part, file in zip(parts[2:4], ("adapter_config.json", "adapter_model.safetensors"), strict=True):
        header, content = part.split(b"\r\n\r\n", 1)
        assert header == f'\r\nContent-Disposition: form-data; name="files"; filename="{file}"'.encode()
        assert content == (folder / file).read_bytes() + b"\r\n"
    assert parts[4:] == [b"--\r\n"]


def test_unknown_laws_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "model", "--laws", "4,99"])
    assert "laws are 4, 5, 6" in capsys.readouterr().err
