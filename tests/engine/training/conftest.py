"""An engine with memory for training, one for each module of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from training_session import TrainingSession

from lora_serve.training_messages import CloseRun


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingSession]:
    session = TrainingSession(tmp_path_factory.mktemp("engine"))
    yield session
    session.engine.close()


@pytest.fixture
def session(engine: TrainingSession) -> Iterator[TrainingSession]:
    yield engine
    for name in engine.created:
        engine.call(CloseRun(name))
