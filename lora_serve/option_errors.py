"""Operators' mistakes in options, said so that they can be mended: where each was given, and what may have been meant.

An option is given on the command line, in the environment or in the YAML file that --config names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_settings import SettingsError

from lora_serve.adapter_sources import options_variable
from lora_serve.config import ServeConfig
from lora_serve.errors import BadRequest, ModelUnsupported

PREFIX = "LORA_SERVE_"
OTHER_VARIABLES = ("API_KEY", "KERNEL_FLAGS")  # of other commands, and of the kernels' build
# What Kubernetes puts into every container for a Service named lora-serve, or lora-serve-something.
SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


def check_environment(environment: MutableMapping[str, str]) -> None:
    """Refuse variables that look like options and are none, and drop what Kubernetes sets. Raises BadRequest."""
    for variable, value in list(environment.items()):
        if variable.startswith(PREFIX) and variable.endswith("PORT") and "://" in value:  # of such a Service too
            del environment[variable]
    known = [*(name.upper() for name in ServeConfig.model_fields), *OTHER_VARIABLES]
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        if variable == name or name in known or variable.startswith(options_variable("")):
            continue
        if SERVICE_LINK.fullmatch(name):
            continue
        raise BadRequest(f"environment: there is no option {variable}{_meant(name, known, PREFIX)}")


def check_config_file(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a YAML file that is no list of options, or has one twice. Raises BadRequest."""
    file = _config_file(arguments, environment)
    if not file or not (root := _nodes(file)):
        return
    if not isinstance(root, yaml.MappingNode):
        raise BadRequest(f"{file}, line {root.start_mark.line + 1}: options are written as NAME: VALUE, one a line")
    lines: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if lines.setdefault(key.value, line) != line:
            raise BadRequest(f"{file}, line {line}: {key.value}: it is in line {lines[key.value]} already")


def describe_parse_error(error: SettingsError, options: Iterable[str]) -> str:
    """What is wrong with a command line that could not be parsed; `options`: those that it may have."""
    message = " ".join(str(error).split()).removeprefix("error parsing CLI: ")
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
        named = [word.partition("=")[0] for word in unknown[1].split() if word.startswith("--")]
        if not named:
            return f"one argument too many: {unknown[1]}"
        return f"there is no option {named[0]}{_meant(named[0].removeprefix('--'), options, '--')}"
    if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        choices = re.findall(r"'([^']*)'", choice[2])
        return f"there is no command {choice[1]}{_meant(choice[1], choices)}; there are {', '.join(choices)}"
    if missing := re.fullmatch(r"Error: CLI (subcommand is required) \{(.*)\}", message):
        return f"a {missing[1]}: {missing[2]}"
    return message.removeprefix("argument ")


def describe_invalid_options(
    error: ValidationError, arguments: Sequence[str], positional: Sequence[str], commands: Iterable[str]
) -> list[str]:
    """One line per invalid option: where it was given and what is wrong with it.

    Args:
        positional: options without a name on the command line.
        commands: names in an error's place that are none of an option.
    """
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        option = next((part for part in reversed(problem["loc"]) if isinstance(part, str)), "")
        if option in set(commands):  # about the whole command
            lines.append(message)
            continue
        where = _where(option, arguments, positional, os.environ)
        if problem["type"] == "extra_forbidden":
            message = f"there is no such option{_meant(option, ServeConfig.model_fields)}"
        lines.append(f"{where}: {message}")
    return lines


def check_model(name: str) -> None:
    """Refuse a misspelt path, which would be taken for a hub id. Raises ModelUnsupported."""
    path = Path(name)
    if path.is_dir():
        return
    parts = path.parts
    if path.is_file():
        raise ModelUnsupported(f"{name} is a file; name the folder of the model")
    try:
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        siblings = []
    meant = _meant(path.name, siblings, f"{path.parent}/") if len(parts) > 1 else ""
    # A folder may have the name of an organisation on the hub: then it is a path only if it resembles one.
    if name.startswith(("/", ".", "~")) or len(parts) > 2 or meant:
        raise ModelUnsupported(f"there is no folder {name}{meant}")


def _where(option: str, arguments: Sequence[str], positional: Sequence[str], environment: Mapping[str, str]) -> str:
    """Where an option was given: the strongest of the places that have it."""
    flag = "--" + option.replace("_", "-")
    if any(word.partition("=")[0] == flag for word in arguments):
        return flag
    if (variable := f"{PREFIX}{option.upper()}") in environment:
        return f"environment: {variable}"
    file = _config_file(arguments, environment)
    if file and (line := _line(file, option)):
        return f"{file}, line {line}: {option}"
    return option.upper() if option in positional else flag


def _config_file(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word.partition("=")[0] == "--config":
            return word.partition("=")[2] or following
    return environment.get(f"{PREFIX}CONFIG")


def _line(file: str, option: str) -> int | None:
    """The line of an option in a YAML file, from 1."""
    node = _nodes(file)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((key.start_mark.line + 1 for key, _ in pairs if key.value == option), None)


def _nodes(file: str) -> yaml.Node | None:
    """The content of a YAML file with the lines of each part; None if it cannot be read, which is said elsewhere."""
    try:
        return yaml.compose(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _meant(given: str, known: Iterable[str], prefix: str = "") -> str:
    close = get_close_matches(given, list(known), 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
