"""The group of the `lora-serve adapter …` commands."""

from __future__ import annotations

from pydantic import BaseModel, Field
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

    list: CliSubCommand[ListCommand] = Field(description="all adapters, with their tiers and sizes")
    show: CliSubCommand[ShowCommand] = Field(description="one adapter, as JSON")
    upload: CliSubCommand[UploadCommand] = Field(description="publish a folder or archive")
    inspect: CliSubCommand[InspectCommand] = Field(description="report on an adapter; publishes nothing")
    pull: CliSubCommand[PullCommand] = Field(description="write an adapter's PEFT files into a folder")
    push: CliSubCommand[PushCommand] = Field(description="publish an adapter on another server")
    delete: CliSubCommand[DeleteCommand] = Field(description="delete an adapter")
    load: CliSubCommand[LoadCommand] = Field(description="load an adapter into memory")
    evict: CliSubCommand[EvictCommand] = Field(description="evict an adapter from memory")
    pin: CliSubCommand[PinCommand] = Field(description="load an adapter and never evict it")
    unpin: CliSubCommand[UnpinCommand] = Field(description="allow an adapter to be evicted again")
