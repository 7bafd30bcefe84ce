"""Write the plain manifests in deploy/kubernetes, which are the chart's with its default values.

They name a Secret with keys, lora-serve-keys, that is to be made before.

    python deploy/render.py
"""

from __future__ import annotations

from pathlib import Path

from helm_python import Chart

HERE = Path(__file__).parent
CHART = HERE / "helm" / "lora-serve"
ALL = {"serviceMonitor": {"enabled": True}, "inferencePool": {"enabled": True}}
FILES = {  # plain file → templates, in the order in which they are applied
    "lora-serve.yaml": ("options", "claim", "service", "deployment"),
    "monitoring.yaml": ("servicemonitor",),
    "gateway.yaml": ("inferencepool",),
}
HEADER = "# Made of deploy/helm/lora-serve by deploy/render.py.\n"


def manifests() -> dict[str, str]:
    """The text of each plain file."""
    rendered = Chart.load(CHART).render(ALL, name="lora-serve", namespace="default")
    return {
        name: HEADER
        + "".join(f"---\n{rendered[f'lora-serve/templates/{template}.yaml'].strip()}\n" for template in templates)
        for name, templates in FILES.items()
    }


if __name__ == "__main__":
    for name, text in manifests().items():
        (HERE / "kubernetes" / name).write_text(text)
