"""The compose file: what it starts the server with is right, and it waits for the drain."""

from __future__ import annotations

from pathlib import Path

import yaml

from lora_serve.cli import Cli
from lora_serve.config import ServeConfig

ROOT = Path(__file__).parents[2]


def test_the_command_is_one_of_the_server_and_the_stop_waits_for_its_drain() -> None:
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    command = service["command"].replace("/opt/demo/model", "demo/model").replace("/opt/demo/adapters", "adapters")
    config = Cli(_cli_parse_args=command.split()).serve
    assert isinstance(config, ServeConfig)
    assert int(service["stop_grace_period"].removesuffix("s")) >= config.drain_timeout + 5
    assert str(config.api_key_file).startswith(service["volumes"][0].split(":")[1])
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
