"""The command line: options in, one of three jobs done, readable errors out.

`serve` runs the server, `key` makes an API key, `adapter` talks to a running server. What the jobs do is in the
rooms that they call; nothing here is needed by a program that uses those.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
    get_subcommand,
)

from lora_serve.config import ServeConfig
from lora_serve.errors import ServeError
from lora_serve.remote import AdapterCommand


class Key(BaseModel):
    """Make an API key: prints the key, to be given to its user, and the line for the --api-key-file."""

    name: CliPositionalArg[str] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="whose key it is")
    admin: bool = Field(False, description="may also upload and delete adapters")


class Cli(BaseSettings):
    """One language model, hundreds of LoRA adapters, one mixed batch. `lora-serve --version` prints the version."""

    model_config = SettingsConfigDict(
        cli_prog_name="lora-serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    serve: CliSubCommand[ServeConfig]
    key: CliSubCommand[Key]
    adapter: CliSubCommand[AdapterCommand]


def main(arguments: Sequence[str] | None = None) -> int:
    """The `lora-serve` command. Returns the exit status: 0 done, 1 failed, 2 asked in a way that makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--version"], ["-V"]):
        print(f"lora-serve {version('lora-serve')}")
        return 0
    try:
        chosen = get_subcommand(CliApp.run(Cli, cli_args=given or ["--help"]), is_required=True)
    except ValidationError as error:
        for line in complaints(error):
            print(f"lora-serve: {line}", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"lora-serve: {error}", file=sys.stderr)
        return 2
    try:
        match chosen:
            case ServeConfig():
                return serve(chosen)
            case Key():
                return make_key(chosen)
            case AdapterCommand():
                return chosen.run()
    except ServeError as error:
        print(f"lora-serve: {error.message}", file=sys.stderr)
        return 1
    return 2


def complaints(error: ValidationError) -> list[str]:
    """One line an option: how it is spelt on the command line, and what is wrong with it."""
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][-1] if isinstance(problem["loc"][-1], str) else problem["loc"][-2])
        spelt = name.upper() if name in ("model", "name") else f"--{name.replace('_', '-')}"
        lines.append(f"{spelt}: {problem['msg'].removeprefix('Value error, ')}")
    return lines


def serve(config: ServeConfig) -> int:
    # The compute threads are the engine's. Set before anything imports a maths library; the engine gets its own value.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from lora_serve import server

    return server.serve(config)
