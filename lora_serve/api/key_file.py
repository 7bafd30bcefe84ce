"""API keys, and the file that they are in. Only hashes of keys are kept."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_serve.api.caller import NO_LIMITS, Caller, Limits
from lora_serve.errors import BadRequest

HASH = re.compile(r"sha256:[0-9a-f]{64}")
LENGTH_OF_KEY = 16  # hex digits
RECHECK = 1.0  # seconds between two looks at the key file

log = logging.getLogger(__name__)


def hash_key(text: str) -> str:
    """Hash of a key as written in the key file. Keys are long and random, so a plain SHA-256 is enough."""
    return f"sha256:{sha256(text.encode()).hexdigest()}"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    hash: str
    admin: bool = False
    adapters: list[str] | None = None
    metrics: bool = False
    share: Annotated[float, Field(ge=0.01, le=1000)] = 1.0
    limits: Limits = NO_LIMITS
    limits_per_adapter: Limits = NO_LIMITS

    @model_validator(mode="after")
    def _metrics_are_of_all_adapters(self) -> _Entry:
        if self.metrics and self.adapters is not None:
            raise ValueError("metrics tell of all adapters, so a key with adapters cannot have metrics: true")
        return self


class UniqueLoader(yaml.SafeLoader):
    """YAML in which no name occurs twice, and none is merged from elsewhere: a permission is where it is read."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "<< is not read here", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, "a name occurs twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


class Keys:
    """All API keys of a server.

    Args:
        callers: hash of a key, as `hash_key` makes it → its owner.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    def __repr__(self) -> str:
        admins = sum(caller.admin for caller in self._callers.values())
        return f"<{type(self).__name__} {len(self._callers)} keys, {admins} of admins>"

    @property
    def owners(self) -> set[str]:
        """Whose files there may be."""
        return {caller.owner for caller in self._callers.values()}

    def find(self, key: str) -> Caller | None:
        """The owner of a key. Every key is compared, in constant time, so timing reveals nothing."""
        given = hash_key(key)
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, given):
                found = caller
        return found


class KeyFile(Keys):
    """The keys of a YAML file, which is read again when its size or modification time has changed.

    The file maps names to a hash, or to `{hash, admin, adapters, metrics, share, limits,
    limits_per_adapter}`. A changed file that is invalid is
    logged, and the keys before it stay valid.

    Args:
        clock: seconds; the file is looked at no more than every `RECHECK`.

    Raises: `BadRequest` that names the invalid entry; a file without any key is an error.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = clock()
        self._signature = _signature(path)  # before the file is read, so that no change is missed
        super().__init__(read_keys(path))

    def find(self, key: str) -> Caller | None:
        if self._clock() - self._checked >= RECHECK:
            self._checked = self._clock()
            self._reread_if_changed()
        return super().find(key)

    def _reread_if_changed(self) -> None:
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._callers = read_keys(self._path)
        except BadRequest as error:
            log.error("the API keys stay as they were: %s", error.message)
        else:
            log.info("the key file was read again: %r", self)


def load_keys(path: Path | None) -> Keys | None:
    """The keys of a file; None without a file. Raises `BadRequest`."""
    return None if path is None else KeyFile(path)


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def read_keys(path: Path) -> dict[str, Caller]:
    """Owners by the hash of their key."""
    try:
        content = yaml.load(path.read_text(), UniqueLoader)
    except yaml.MarkedYAMLError as error:  # not with the line itself, in which there may be a key
        where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise BadRequest(f"the key file cannot be read{where}: {error.problem}") from None
    except OSError as error:
        raise BadRequest(f"the key file {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequest(f"the key file cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise BadRequest("the key file must map names to hashed keys; `lora-serve key add NAME` does")
    callers: dict[str, Caller] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not name:
            raise BadRequest(f"key file: the name of entry {len(callers) + 1} is no text: put it in quotes")
        if name.startswith("sk-") or HASH.fullmatch(name):  # which is not repeated here
            raise BadRequest(f"key file: entry {len(callers) + 1} has a key where its owner's name should be")
        key, caller = _entry(name, value)
        if key in callers:
            raise BadRequest(f"key file: {name} and {callers[key].name} have the same key")
        callers[key] = caller
    return callers


def _entry(name: str, value: Any) -> tuple[str, Caller]:
    try:
        entry = _Entry.model_validate({"hash": value} if isinstance(value, str) else value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([name, *map(str, problem["loc"])])
        raise BadRequest(f"key file: {where}: {problem['msg'].removeprefix('Value error, ')}") from None
    if not HASH.fullmatch(entry.hash):
        raise BadRequest(f"key file: {name}: not the hash of a key (sha256: and 64 hex digits)")
    adapters = None if entry.adapters is None else tuple(entry.adapters)
    share = round(entry.share * 1024) / 1024
    of_all, of_each = entry.limits, entry.limits_per_adapter
    key = sha256(entry.hash.encode()).hexdigest()[:LENGTH_OF_KEY]
    return entry.hash, Caller(name, entry.admin, adapters, entry.metrics, share, of_all, of_each, key)
