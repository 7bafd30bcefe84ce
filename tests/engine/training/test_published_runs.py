"""Adapters of training runs, published by the engine itself: the versions that their PEFT files are."""

from __future__ import annotations

from pathlib import Path

import torch
from training_session import TrainingSession, create

from lora_serve.adapters import lowered_file
from lora_serve.adapters.store.records import describe_folder
from lora_serve.training_messages import ExportRun, PublishRun


def test_a_published_run_is_what_its_peft_files_are(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path)
    assert session.failure(PublishRun("nobody", "own")).kind == "run_not_found"
    session.call(create("run", target_modules=["q_proj", "down_proj"]))
    assert session.failure(PublishRun("run", "no name")).kind == "bad_request"
    session.train("run", range(2))
    (digest,) = {
        session.call(PublishRun("run", name, durable))["versions"][0]["digest"]
        for name, durable in (("own", True), ("again", False))
    }
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
    session.send("r", [5, 6, 7], adapter="again")
    session.run()
    session.engine.close()
