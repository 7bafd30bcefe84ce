"""The command line: options in, one of three jobs done, readable errors out.

`serve` runs the server, `key` makes an API key, `adapter` talks to a running server. What the jobs do is in the
rooms that they call; nothing here is needed by a program that uses those.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
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
from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.remote import AdapterCommand, Remote

POSITIONAL = ("model", "name", "path", "adapter")


class Key(BaseModel):
    """Make an API key: prints the key, to be given to its user, and the line for the --api-key-file."""

    name: CliPositionalArg[str] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="whose key it is")
    admin: bool = Field(False, description="may also publish and delete adapters")


class Cli(BaseSettings):
    """One language model, hundreds of LoRA adapters, one mixed batch. `lora-serve --version` prints the version."""

    model_config = SettingsConfigDict(
        cli_prog_name="lora-serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    serve: CliSubCommand[ServeConfig] = Field(description="serve a base model and its adapters")
    adapter: CliSubCommand[AdapterCommand] = Field(description="manage the adapters of a running server")
    key: CliSubCommand[Key] = Field(description="make an API key")


def main(arguments: Sequence[str] | None = None) -> int:
    """The `lora-serve` command. Returns the exit status: 0 done, 1 failed, 2 asked in a way that makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--version"], ["-V"]):
        print(f"lora-serve {version('lora-serve')}")
        return 0
    try:
        chosen = parse(given)
    except ValidationError as error:
        return say(2, *complaints(error))
    except (SettingsError, yaml.YAMLError) as error:
        return say(2, " ".join(str(error).split()))
    try:
        match chosen:
            case ServeConfig():
                return serve(chosen)
            case Key():
                make_key(chosen)
            case Remote():
                chosen.run()
    except ServeError as error:
        return say(1, error.message)
    return 0


def parse(arguments: Sequence[str]) -> Any:
    """The subcommand that was asked for, checked. Help and unknown options end the process, as argparse does."""
    chosen = get_subcommand(CliApp.run(Cli, cli_args=list(arguments) or ["--help"]), cli_exit_on_error=False)
    return get_subcommand(chosen, cli_exit_on_error=False) if isinstance(chosen, AdapterCommand) else chosen


def say(status: int, *lines: str) -> int:
    for line in lines:
        print(f"lora-serve: {line}", file=sys.stderr)
    return status


def complaints(error: ValidationError) -> list[str]:
    """One line an option: how it is spelt on the command line, and what is wrong with it."""
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        option = next((part for part in reversed(problem["loc"]) if isinstance(part, str)), "")
        if option in Cli.model_fields:  # of the command as a whole
            lines.append(message)
        else:
            lines.append(f"{option.upper() if option in POSITIONAL else '--' + option.replace('_', '-')}: {message}")
    return lines


def serve(config: ServeConfig) -> int:
    """Run the server until it is told to end."""
    # Compute belongs to the engine process: this one gets no maths threads and no torch at all. A None there makes
    # torch look absent, and transformers brings its tokenizers alone: half the time, a quarter of the memory.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.modules["torch"] = None  # type: ignore[assignment]
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Imported here: the other commands should not wait for a web server's libraries.
    from lora_serve import server
    from lora_serve.api.app import create_app
    from lora_serve.api.auth import load_keys

    keys = load_keys(config.api_key_file)
    return server.serve(
        config,
        load_tokenizer=lambda: load_tokenizer(config),
        make_app=lambda engine, tokenizer: create_app(engine, tokenizer, config, keys),
    )


def load_tokenizer(config: ServeConfig) -> Any:
    """The base's own tokenizer; code that comes with it is never run. Raises `ModelUnsupported`."""
    if config.model.startswith(("/", ".")) and not Path(config.model).is_dir():
        raise ModelUnsupported(f"there is no folder {config.model}")
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnsupported(f"the tokenizer of {config.model} cannot be loaded: {error}") from error
    tokenizer.model_max_length = sys.maxsize  # the engine knows how long a context is; here it would only warn
    return tokenizer


def make_key(key: Key) -> None:
    """Print a fresh key and the entry that makes the server accept it."""
    from lora_serve.api.auth import hash_key

    secret = f"sk-{secrets.token_urlsafe(32)}"
    print(f"key of {key.name}, shown only now: {secret}")
    entry = f'{{hash: "{hash_key(secret)}", admin: true}}' if key.admin else hash_key(secret)
    print(f"{key.name}: {entry}")
