"""Ray Serve: replicas of this server behind one endpoint. Needs the extra `lora-serve[ray]`."""

from lora_serve.ray.application import app

__all__ = ["app"]
