"""The group of the `lora-serve adapter …` commands."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic_settings import CliSubCommand

from lora_serve.remote import (
    DeleteCommand,
    EvictCommand,
    InspectCommand,
    ListCommand,
    LoadCommand,
    PinCommand,
    ShowCommand,
    UnpinCommand,
    UploadCommand,
)
from lora_serve.remote_copies import PullCommand, PushCommand


class AdapterCommand(BaseModel):
    """List, inspect, publish, copy and manage the adapters of a running server."""

    list: CliSubCommand[ListCommand]
    show: CliSubCommand[ShowCommand]
    upload: CliSubCommand[UploadCommand]
    inspect: CliSubCommand[InspectCommand]
    pull: CliSubCommand[PullCommand]
    push: CliSubCommand[PushCommand]
    delete: CliSubCommand[DeleteCommand]
    load: CliSubCommand[LoadCommand]
    evict: CliSubCommand[EvictCommand]
    pin: CliSubCommand[PinCommand]
    unpin: CliSubCommand[UnpinCommand]
