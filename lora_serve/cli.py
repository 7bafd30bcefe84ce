"""The `lora-serve` command.

`serve` runs the server; `adapter`, `train` and `top` manage, use and show a running one; `store` works on its folder,
`key` on the file of API keys.
Options are parsed here and errors printed; the work is done elsewhere.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
    get_subcommand,
)

from lora_serve import log_format
from lora_serve.adapter_commands import AdapterCommand
from lora_serve.adapter_sources import parse_sources
from lora_serve.command_help import HelpFormatter
from lora_serve.config import ServeConfig
from lora_serve.errors import BadRequest, ModelUnsupported, ServeError
from lora_serve.key_commands import KeyCommand, KeyCommands
from lora_serve.option_errors import (
    check_config_file,
    check_environment,
    check_model,
    describe_invalid_options,
    describe_parse_error,
)
from lora_serve.remote import RemoteCommand
from lora_serve.shared_store_commands import CleanSharedCommand
from lora_serve.store_commands import StoreCommand, StoreCommands
from lora_serve.top_command import TopCommand
from lora_serve.train_command import TrainCommand

if TYPE_CHECKING:
    from lora_serve.api.key_file import Keys
    from lora_serve.engine.client import EngineClient

LoadKeys = Callable[[Path | None], "Keys | None"]

POSITIONAL = ("model", "name", "path", "adapter", "target", "folders", "url")


class Cli(BaseSettings):
    """One language model, hundreds of LoRA adapters, one mixed batch. `lora-serve --version` prints the version."""

    model_config = SettingsConfigDict(
        cli_prog_name="lora-serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )

    serve: CliSubCommand[ServeConfig] = Field(description="serve a base model and its adapters")
    adapter: CliSubCommand[AdapterCommand] = Field(description="manage the adapters of a running server")
    train: CliSubCommand[TrainCommand] = Field(description="train an adapter on a running server")
    top: CliSubCommand[TopCommand] = Field(description="show what a running server does")
    store: CliSubCommand[StoreCommands] = Field(description="verify, list, export and import a store's adapters")
    key: CliSubCommand[KeyCommands] = Field(description="make, list and revoke API keys")


def main(arguments: Sequence[str] | None = None, load_keys: LoadKeys | None = None) -> int:
    """Run the `lora-serve` command. Returns the exit status: 0 success, 1 failure, 2 invalid usage.

    Args:
        load_keys: how `serve` gets its API keys, if not just from the key file.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--version"], ["-V"]):
        print(f"lora-serve {version('lora-serve')}")
        return 0
    try:
        check_environment(os.environ)
        if given[:1] == ["serve"]:
            check_config_file(given, os.environ)
        chosen = parse(given)
    except ValidationError as error:
        return print_error(2, *describe_invalid_options(error, given, POSITIONAL, Cli.model_fields))
    except SettingsError as error:
        return print_error(2, describe_parse_error(error, options_of(given)))
    except yaml.YAMLError as error:
        return print_error(2, " ".join(str(error).split()))
    except BadRequest as error:
        return print_error(2, error.message)
    try:
        match chosen:
            case ServeConfig():
                return serve(chosen, load_keys)
            case RemoteCommand() | StoreCommand() | CleanSharedCommand() | KeyCommand():
                chosen.run()
    except ServeError as error:
        return print_error(1, error.message)
    return 0


def parse(arguments: Sequence[str]) -> Any:
    """The validated subcommand. --help and unknown options end the process, as in argparse."""
    source: CliSettingsSource[Any] = CliSettingsSource(Cli, formatter_class=HelpFormatter)
    cli = CliApp.run(Cli, cli_args=list(arguments) or ["--help"], cli_settings_source=source)
    chosen = get_subcommand(cli, cli_exit_on_error=False)
    if isinstance(chosen, AdapterCommand | StoreCommands | KeyCommands):
        return get_subcommand(chosen, cli_exit_on_error=False)
    return chosen


def options_of(arguments: Sequence[str]) -> list[str]:
    """Names of the options that the subcommand of these arguments has."""
    model: Any = Cli
    for word in arguments:
        field = model.model_fields.get(word.replace("-", "_"))
        if field is None:
            break
        model = next(iter(each for each in get_args(field.annotation) if each is not type(None)))
    return [name.replace("_", "-") for name in model.model_fields]


def print_error(status: int, *lines: str) -> int:
    """Print lines to stderr and return `status`."""
    for line in lines:
        print(f"lora-serve: {line}", file=sys.stderr)
    return status


def serve(config: ServeConfig, load_keys: LoadKeys | None = None) -> int:
    """Run the server until it is told to stop."""
    check_model(config.model)
    # Only the engine process computes. Without torch, transformers loads its tokenizers alone: half the start-up time
    # and a quarter of the memory; None in sys.modules makes the import fail.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.modules["torch"] = None  # type: ignore[assignment]
    expect_no_torch()
    log_format.configure(config.log_level, config.log_format, "")
    # Imported here, so that the other commands start faster.
    from lora_serve.api import key_file

    keys = (load_keys or key_file.load_keys)(config.api_key_file)
    from lora_serve import server
    from lora_serve.api.app import create_app
    from lora_serve.api.traces import RequestTraces
    from lora_serve.sources.fetcher import check_sources

    check_sources(parse_sources(config.adapter_source), os.environ)
    traces = RequestTraces.from_environment() if config.traces else None

    def make_app(engine: EngineClient, tokenizer: Any) -> server.App:
        app = create_app(engine, tokenizer, config, keys, traces)
        return server.App(app, app.state.services.jobs.drain)

    return server.serve(config, load_tokenizer=lambda: load_tokenizer(config), make_app=make_app)


def expect_no_torch() -> None:
    """Let transformers be imported without its warning that there is no torch."""
    logging.getLogger("transformers").addFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def load_tokenizer(config: ServeConfig) -> Any:
    """Load the base model's tokenizer, without running code that comes with it. Raises `ModelUnsupported`."""
    expect_no_torch()
    from lora_serve.engine.base_tokenizer import load_base_tokenizer

    try:
        tokenizer = load_base_tokenizer(config.model, config.revision)
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())
        hub = "" if Path(config.model).is_dir() else f"there is no folder {config.model}, and as a hub id: "
        raise ModelUnsupported(f"{hub}the tokenizer of {config.model} cannot be loaded: {why}") from error
    tokenizer.model_max_length = sys.maxsize  # the engine checks the context length; here it would only warn
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelUnsupported(f"the chat template {config.chat_template} cannot be read: {reason}") from error
    return tokenizer
