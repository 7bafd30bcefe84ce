"""A store as the first released version of lora-serve wrote it."""

from __future__ import annotations

import json
from pathlib import Path

A, B = "a" * 64, "b" * 64  # digests of lowered content


def make_first_format(root: Path) -> None:
    """Two versions, of which `a` and `also-a` name one; and the name `b` of the other, published from a folder."""
    for digest, weights in ((A, "of a"), (B, "of b")):
        version = root / "versions" / digest
        version.mkdir(parents=True)
        (version / "adapter_config.json").write_text('{"lora_alpha": 8}')
        (version / "adapter_model.safetensors").write_text(weights)
        meta = {"created": 1700000000.5, "rank": 4, "modules": 1, "elements": 8, "file_bytes": 9, "report": {}}
        (version / "meta.json").write_text(json.dumps(meta | {"traits": {}, "vectors": 0}))
    (root / "versions" / A / "README.md").write_text("card")
    (root / "names").mkdir()
    for name, digest, source in (("a", A, ""), ("also-a", A, ""), ("b", B, "signature")):
        record = {"digest": digest, "created": 1700000000.5, "source": source}
        (root / "names" / f"{name}.json").write_text(json.dumps(record))
    (root / "staging").mkdir()
    (root / "lock").touch()
