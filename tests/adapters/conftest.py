"""Fixture: a registry on a small base, closed after the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_harness import RegistryHarness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[RegistryHarness]:
    harness = RegistryHarness(tmp_path)
    yield harness
    harness.registry.close()
