"""Server configuration: all options, from the command line, environment variables or a YAML file."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from lora_serve.adapter_sources import parse_sources
from lora_serve.names import CONFIG

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
MOST_SEQS = 256  # default max_num_seqs on a GPU; on a CPU it is lower


class Size(ByteSize):
    """A number of bytes, shown as one writes it."""

    def __str__(self) -> str:
        whole = next((unit for unit in ("GiB", "MiB", "KiB") if self % UNITS[unit] == 0), None)
        return str(int(self)) if whole is None else f"{self // UNITS[whole]}{whole}"

    __repr__ = __str__


def _listed(value: Any) -> Any:
    """The elements of a list as text, which the environment has: with commas between them, or JSON."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [part for part in value.split(",") if part]
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError("write the elements of the list with commas between them") from error


Texts = Annotated[list[str], NoDecode, BeforeValidator(_listed)]
Paths = Annotated[list[Path], NoDecode, BeforeValidator(_listed)]


def is_public(host: str) -> bool:
    """Whether `host` is reachable from other machines; a host name that is not an address counts as public."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def parse_shared_store(url: str) -> tuple[str, str]:
    """Scheme of a shared store's URL, and what follows it: a folder, or BUCKET/PREFIX. Raises ValueError."""
    scheme, _, place = url.partition("://")
    place = place.rstrip("/")
    plain = not re.search(r"[?#\\\s@]|//", place) and not any(part in (".", "..") for part in place.split("/"))
    if scheme not in ("file", "s3") or not place or not plain or (scheme == "file") != place.startswith("/"):
        raise ValueError(f"{url} is not file:///FOLDER or s3://BUCKET/PREFIX")
    return scheme, place


class ServeConfig(BaseSettings):
    """Serve one base model and its LoRA adapters over an OpenAI-style API.

    Options come, strongest first, from the command line, from environment variables named LORA_SERVE_… (LORA_SERVE_PORT
    for --port), from the YAML file that --config names, and from the defaults below.
    """

    model_config = SettingsConfigDict(
        env_prefix="LORA_SERVE_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="forbid",
        protected_namespaces=(),
    )

    model: CliPositionalArg[str] = Field("", validate_default=True, description="local folder or hub id of the base")
    config: Path | None = Field(None, description="YAML file of these options, named with underscores")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    served_model_name: str | None = Field(None, description="name of the base in the API (default: as given in MODEL)")
    chat_template: Path | None = Field(None, description="Jinja file of the chat template (default: the model's)")

    adapters: Path | None = Field(None, description="folder of PEFT adapter folders to publish at start")
    watch: bool = Field(
        False,
        description="follow the folder --adapters: publish what is added or changed, unpublish what is removed",
    )
    trust_settings: bool = Field(
        False,
        description="let the serve.yaml of adapters in the folder --adapters count: their system prompts, chat "
        "templates, tokens and defaults",
    )
    store: Path | None = Field(
        None, description="folder where published adapters are kept (default: per base, in the user's data folder)"
    )
    shared_store: str | None = Field(
        None,
        description="URL of the store that replicas share: file:///… or s3://BUCKET/PREFIX; a change at one is made at "
        "all (default: none)",
    )
    adapter_source: list[str] = Field(
        [],
        description="NAME=URL of adapters (file, hf, s3, gs, https), where one is fetched that is asked for and not "
        "published; may be given several times",
    )
    source_timeout: float = Field(
        300.0, gt=0, description="seconds that fetching an adapter from sources may take, retries included"
    )
    adapter_slots: int = Field(64, ge=1, le=65535, description="adapters on the device at the same time")
    adapter_cache_memory: Size = Field(Size(2 << 30), description="host memory for adapters, e.g. 2GiB")
    adapter_device_memory: Size | None = Field(
        None,
        description="GPU memory for adapters; one request may use half of it (default: a tenth of the GPU's)",
    )
    max_adapter_size: Size = Field(Size(2 << 30), description="maximum size of an adapter, unpacked")
    max_file_size: Size = Field(Size(512 << 20), description="maximum size of a file of training data")
    max_files_size: Size = Field(Size(8 << 30), description="maximum size of all files of one API key together")
    keep_versions: int = Field(
        3, ge=1, description="versions of an adapter that stay in the store, the newest included"
    )
    compiler_memory: Size = Field(Size(8 << 30), description="memory that checking and lowering one adapter takes")
    compiler_cpu_time: int = Field(120, ge=1, description="seconds of CPU time that lowering one adapter may take")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of weights, KV and adapters (auto: the checkpoint's)"
    )
    quantize: Literal["int8", "int4", "fp8"] | None = Field(
        None,
        description="quantize the base's linear modules and experts at load; adapters keep their precision; "
        "fp8 needs a GPU of Ada or newer",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="devices of this machine that share the base's layers, a process for each"
    )
    threads: int = Field(0, ge=0, description="compute threads (0: one per physical core)")
    native_kernels: bool = Field(True, description="use the C++ or Triton kernels; otherwise plain torch")

    max_model_len: int | None = Field(
        None, ge=8, description="longest context in tokens (default: the model's, as far as memory allows)"
    )
    max_num_seqs: int | None = Field(None, ge=1, description="sequences in one step (default: 64; on a GPU 256)")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one step; longer prompts are split into chunks (default: 512; on a GPU 2048)",
    )
    kv_cache_memory: Size | None = Field(
        None, description="device memory for the KV cache, e.g. 4GiB (default: 1GiB; on a GPU all that is left)"
    )
    itl_target: float | None = Field(
        None,
        gt=0,
        description="seconds between two tokens of a stream that prompts should not exceed (default: 0.025, or more "
        "where steps take long)",
    )
    ttft_target: float | None = Field(
        None,
        gt=0,
        description="seconds to the first token that should not be exceeded, at the cost of the streams if need be "
        "(default: none)",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that may be used")
    kv_block_size: int = Field(16, ge=1, le=256, description="tokens in a KV block")
    training_memory: Size = Field(
        Size(0),
        description="memory for adapters in training and a pass over their data; served adapters use it while "
        "nothing is trained; 0: no training, nothing of it is loaded",
    )
    training_share: float = Field(
        0.003,
        ge=0,
        le=1,
        description="share of the time that training gets even where it delays streams; without streams it gets all",
    )
    training_jobs: int = Field(4, ge=1, description="fine-tuning jobs that train at once; further ones wait")
    prefix_cache: bool = Field(True, description="reuse the KV of shared prompt prefixes under the same adapter")
    max_queue: int = Field(1024, ge=1, description="requests that may wait; further ones get 429")

    api_key_file: Path | None = Field(
        None, description="YAML file of hashed API keys; without it every caller may do everything"
    )
    allow_origin: Texts = Field(
        [],
        description="origins of web pages that may use the server, with commas between them, e.g. "
        "https://chat.example.com; * with keys only",
    )
    insecure: bool = Field(False, description="allow a public --host without --api-key-file")
    adapter_roots: Paths = Field(
        [], description="folders that /v1/load_lora_adapter may read from, with commas between them"
    )
    max_body: Size = Field(Size(8 << 20), description="maximum size of a JSON body")
    max_n: int = Field(16, ge=1, description="maximum n of a request")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests have to finish after SIGTERM")
    heartbeat_timeout: float = Field(
        60.0, gt=0, description="seconds without a heartbeat before the engine is restarted"
    )
    traces: bool = Field(False, description="export OpenTelemetry traces, as OTEL_… environment variables say")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum log level")
    log_format: Literal["text", "json"] = Field("text", description="text lines, or one JSON object a line")

    def served_name(self) -> str:
        """Name of the base in the API: as configured, or the name of a local folder."""
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    @field_validator("model")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("name the base model: a local folder or a hub id")
        return value

    @field_validator("adapters")
    @classmethod
    def _adapters_are_in_folders_of_their_own(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"there is no folder {value}")
        if value is not None and (value / CONFIG).exists():
            parent = value.resolve().parent
            raise ValueError(f"{value} is itself an adapter: give the folder that it is in, {parent}, to serve it")
        return value

    @field_validator("watch")
    @classmethod
    def _a_folder_is_watched(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("adapters") is None:
            raise ValueError("there is no folder to watch; give one with --adapters")
        return value

    @field_validator("trust_settings")
    @classmethod
    def _a_folder_is_trusted(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("adapters") is None:
            raise ValueError("there is no folder whose settings to trust; give one with --adapters")
        return value

    @field_validator("adapter_source")
    @classmethod
    def _sources_are_named_places(cls, value: list[str]) -> list[str]:
        parse_sources(value)
        return value

    @field_validator("shared_store")
    @classmethod
    def _a_shared_store_is_a_place(cls, value: str | None) -> str | None:
        if value is not None:
            parse_shared_store(value)
        return value

    @field_validator("training_memory")
    @classmethod
    def _one_device_trains(cls, value: Size, info: ValidationInfo) -> Size:
        if value and (info.data.get("tensor_parallel") or 1) > 1:
            raise ValueError("a base that several devices share cannot be trained; leave --tensor-parallel away")
        return value

    @field_validator("allow_origin")
    @classmethod
    def _origins_are_as_browsers_send_them(cls, value: list[str], info: ValidationInfo) -> list[str]:
        for origin in value:
            if origin == "*":
                if info.data.get("api_key_file") is None:
                    raise ValueError("* lets every web page use the server, so it needs --api-key-file")
            elif not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
                raise ValueError(
                    f"{origin} is not an origin, such as https://chat.example.com or http://localhost:3000"
                )
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
        **_: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = init_settings().get("config") or env_settings().get("config")
        if file and not Path(file).is_file():
            raise SettingsError(f"config: there is no file {file}")
        yaml = (YamlConfigSettingsSource(settings_cls, yaml_file=file),) if file else ()
        return init_settings, env_settings, *yaml
