"""Who sends a request, and what they may do."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lora_serve.api.error_handlers import Forbidden
from lora_serve.api.private_adapters import may_use_private
from lora_serve.names import adapter_not_found

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """How much may be used; None is without limit.

    Attributes:
        requests_per_minute, tokens_per_minute: prompt and generated tokens together; on average, and at most as much at
            once.
        concurrent: requests at the same time.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent: Count | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: of the key; also the tenant, whose prefix cache is separate. Empty without keys.
        admin: may publish, evict, pin and delete adapters.
        adapters: names or shell patterns of the adapters that may be seen, used and changed; None is all.
        metrics: may read the metrics, which tell of all adapters; so may an admin of all adapters.
        share: of what the server computes while others wait, relative to theirs; a multiple of 1 / 1024.
        limits, limits_per_adapter: of all its requests, and of those with any one adapter (or with the base alone).
        key: tells its key from others that had the name before; not the key, nor what is compared with it.
    """

    name: str
    admin: bool = False
    adapters: tuple[str, ...] | None = None
    metrics: bool = False
    share: float = 1.0
    limits: Limits = NO_LIMITS
    limits_per_adapter: Limits = NO_LIMITS
    key: str = field(default="", compare=False)

    @property
    def owner(self) -> str:
        """Whose its files are: this key's, not those of a key that has the name later. Empty without keys."""
        return f"{self.name}@{self.key}" if self.key else self.name

    @property
    def sees_everything(self) -> bool:
        """Whether it may read metrics and usage, which tell of all adapters and keys."""
        return self.metrics or (self.admin and self.adapters is None)

    def may_use(self, adapter: str) -> bool:
        """Whether this caller may see, use and, as an admin, change an adapter."""
        if (own := may_use_private(adapter, self.owner)) is not None:
            return own
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def check_may_use(self, adapter: str) -> str:
        """Return the name of an adapter. Raises `AdapterNotFound` if it may not be used, as if it did not exist."""
        if not self.may_use(adapter):
            raise adapter_not_found(adapter)
        return adapter

    def check_may_publish(self, adapter: str, param: str = "name") -> str:
        """Return the name of an adapter to publish. Raises `Forbidden` if it is not one of this caller's."""
        if not self.may_use(adapter):
            raise Forbidden("this key may not publish an adapter of that name", param=param)
        return adapter


EVERYBODY = Caller("", admin=True)
