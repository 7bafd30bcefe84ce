"""What aliases choose a target of an API call by: its id, its user, and the headers that aliases name."""

from __future__ import annotations

from fastapi import Request

from lora_serve.api.services import Services
from lora_serve.request import Routing


def routing_of(http: Request, call: str, user: str | None, services: Services) -> Routing:
    """What a call's requests are routed by; headers that no alias goes by are left out."""
    headers = {name: http.headers[name] for name in services.engine.stats.sticky_headers if name in http.headers}
    return Routing(call, user or "", headers)
