"""Adapters of training runs, published by the engine itself: the versions that their PEFT files are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_session import TrainingSession, create

from lora_serve.adapters import lowered_file
from lora_serve.adapters.store.records import describe_folder
from lora_serve.messages import ListAdapters
from lora_serve.training_messages import ExportRun, PublishRun


@pytest.mark.parametrize("durable", [True, False])
def test_a_published_run_is_what_its_peft_files_are(tmp_path: Path, durable: bool) -> None:
    session = TrainingSession(tmp_path)
    session.call(create("run", target_modules=["q_proj", "down_proj"]))
    session.train("run", range(2))
    digest = session.call(PublishRun("run", "own", durable))["versions"][0]["digest"]
    session.call(ExportRun("run", str(tmp_path / "peft")))
    assert describe_folder(tmp_path / "peft", "").digest == digest
    store = Path(session.engine.info.store)
    assert not list((store / "staging").iterdir())
    stored = lowered_file.read(store / "versions" / digest, digest)
    assert session.engine._training is not None
    trained = session.engine._training._runs["run"].trained
    for name, layer in trained.layers.items():
        offsets = stored.offsets[name].views(layer.module.site, stored.flat)
        assert torch.equal(offsets.a, layer.a(trained.masters))
        assert torch.equal(offsets.b, layer.b(trained.masters) * layer.module.scaling)
    session.send("r", [5, 6, 7], adapter="own")
    session.run()
    session.engine.close()


def test_a_run_that_there_is_not_is_not_published(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path)
    assert session.failure(PublishRun("nobody", "own")).kind == "run_not_found"
    session.call(create("run"))
    assert session.failure(PublishRun("run", "no name")).kind == "bad_request"
    assert session.call(ListAdapters()) == []
    session.engine.close()
