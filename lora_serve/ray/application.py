"""The Ray Serve application: `serve run lora_serve.ray:app model=<folder or hub id> replicas=3`."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from lora_serve.api.origin import LocalOrigin
from lora_serve.config import ServeConfig, Size
from lora_serve.ray.engine_replica import STATISTICS_PERIOD, EngineReplica
from lora_serve.ray.ingress import Ingress
from lora_serve.replicas.change_journal import default_journal, journal_of

NOT_HERE = ("host", "port", "store", "config", "adapter_roots")  # a replica's own, or the ingress's


class AppOptions(BaseModel):
    """Options of the application; any other one is one of `lora-serve serve`, named with underscores.

    Attributes:
        model: the base: a local folder, the same on every node, or a hub id.
        replicas: how many, or with `max_replicas` how many at least.
        max_replicas: how many at most, if they are to follow the number of requests.
        target_requests: requests in flight per replica at which it stays as many as there are.
        upscale_delay, downscale_delay: seconds for which more, or fewer, must have been needed.
        replica_requests: requests in flight at a replica at most; others wait in the ingress.
        max_waiting: requests that may wait there; further ones get 429.
        spill_at: requests in flight at a replica from which on others, with less than half as many, take its requests.
        cpus, gpus: of each replica.
        ingress_replicas: how many processes receive requests.
        journal: folder on all nodes where published adapters are kept, for replicas that start later.
        max_upload: maximum size of an adapter that is published.
        start_timeout: seconds within which a response must begin.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_requests: float = Field(32, gt=0)
    upscale_delay: float = Field(10, ge=0)
    downscale_delay: float = Field(300, ge=0)
    replica_requests: int = Field(256, ge=1)
    max_waiting: int = Field(1024, ge=1)
    spill_at: int = Field(32, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    ingress_replicas: int = Field(1, ge=1)
    journal: Path | None = None
    max_upload: Size = Size(1 << 30)
    start_timeout: float = Field(300, gt=0)

    @model_validator(mode="after")
    def _others_are_the_servers(self) -> AppOptions:
        for name in self.model_extra or {}:
            if name == "shared_store":
                raise ValueError("shared_store is not an option here: the journal brings changes to all replicas")
            if name in NOT_HERE:
                raise ValueError(f"{name} is not an option here: replicas have their own")
            if name not in ServeConfig.model_fields:
                known = [*ServeConfig.model_fields, *type(self).model_fields]
                similar = get_close_matches(name, known, 1)
                raise ValueError(f"{name} is no option" + (f"; did you mean {similar[0]}?" if similar else ""))
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas is less than replicas")
        return self

    @property
    def server(self) -> dict[str, Any]:
        """Options of each replica's server."""
        threads = {} if self.gpus else {"threads": max(1, int(self.cpus))}
        return {"model": self.model, **threads, **(self.model_extra or {})}

    @property
    def journal_folder(self) -> Path:
        """Where the journals of applications are: as given, or in the user's data folder."""
        if self.journal is not None:
            return self.journal.resolve()
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        return default_journal(data / "lora-serve" / "ray", self.model)


def app(args: AppOptions | dict[str, Any]) -> Application:
    """Build the application, `EngineReplica` deployments behind an ingress, from its options.

    Raises: pydantic's `ValidationError`, which names the option.
    """
    options = AppOptions.model_validate(args)
    replica = serve.deployment(
        EngineReplica,
        name="EngineReplica",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.replica_requests,
        max_queued_requests=options.max_waiting,
        health_check_period_s=1,
        health_check_timeout_s=10,
        request_router_config=RequestRouterConfig(
            request_router_class="lora_serve.ray.adapter_router:AdapterRouter",
            request_router_kwargs={"spill_at": options.spill_at},
            request_routing_stats_period_s=2 * STATISTICS_PERIOD,
            request_routing_stats_timeout_s=5,
        ),
        **_scaling(options),
    )
    most_replicas = options.max_replicas or options.replicas
    endpoint = serve.deployment(
        Endpoint,
        name="Ingress",
        num_replicas=options.ingress_replicas,
        max_ongoing_requests=options.max_waiting + options.replica_requests * most_replicas,
        ray_actor_options={"num_cpus": 0.1},
    )
    journal = str(options.journal_folder)  # of this process's user and folder, the same for all
    return endpoint.bind(options, replica.bind(options.server, journal), journal)


@serve.ingress()
class Endpoint:
    """The deployment that receives requests."""

    def __init__(self, options: AppOptions, replicas: DeploymentHandle, journal: str) -> None:
        self._options = options
        self._replicas = replicas
        self._journal = journal_of(Path(journal), serve.get_replica_context().app_name)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray: the ASGI application of one process."""
        options = self._options
        ingress = Ingress(
            self._replicas,
            self._journal,
            keep_versions=self._of_servers("keep_versions"),
            max_body=self._of_servers("max_body"),
            max_upload=options.max_upload,
            start_timeout=options.start_timeout,
        )
        if options.server.get("api_key_file") or options.server.get("insecure"):
            return ingress
        return LocalOrigin(ingress, host="localhost", allow_origin=options.server.get("allow_origin", []))

    def _of_servers(self, option: str) -> int:
        """A number that the replicas' servers were given, or their default."""
        return int(self._options.server.get(option, ServeConfig.model_fields[option].default))


def _scaling(options: AppOptions) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_requests,
            upscale_delay_s=options.upscale_delay,
            downscale_delay_s=options.downscale_delay,
        )
    }
