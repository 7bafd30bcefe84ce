"""The image: with keys, a read-only root and no privileges it serves the demo, tells its health and drains."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from containers import ROOT, Container, build_image, free_port, podman, running

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(1800)]

PORT = 9123  # not the one that the image exposes: the health check has to find it
HARDENED = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
DEMO = ["serve", "/opt/demo/model", "--served-model-name", "demo", "--adapters", "/opt/demo/adapters"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_image(tmp_path_factory.mktemp("podman"))


@pytest.fixture
def volume(image: str) -> Iterator[str]:
    name = podman("volume", "create")
    yield f"{name}:/data"
    podman("volume", "rm", "--force", name)


@pytest.fixture
def key(image: str, volume: str) -> str:
    printed = podman("run", "--rm", "--volume", volume, image, "key", "add", "me", "--file", "/data/keys.yaml")
    return printed.split()[-1]


@pytest.fixture
def server(image: str, volume: str, key: str) -> Iterator[Container]:
    options = [*HARDENED, "--volume", volume]
    with running(image, options, [*DEMO, "--api-key-file", "/data/keys.yaml", "--port", str(PORT)], PORT) as container:
        container.wait_until_ready()
        yield container


def test_the_image_runs_as_a_user_and_has_a_health_check(image: str) -> None:
    (shown,) = json.loads(podman("image", "inspect", image))
    config = shown["Config"]
    assert config["User"] == "1000:1000"
    assert shown["HealthCheck" if "HealthCheck" in shown else "Healthcheck"]["Test"][0] == "CMD"
    assert podman("run", "--rm", "--entrypoint", "sh", image, "-c", "command -v g++ cc make; echo") == ""


def test_without_keys_a_public_bind_is_refused(image: str) -> None:
    with running(image, HARDENED, DEMO, 8000) as container:
        assert podman("wait", container.name) != "0"
        assert "key" in container.logs()


def test_the_demo_serves_with_keys_on_native_kernels_and_is_healthy(server: Container, key: str) -> None:
    assert "native kernels prebuilt for" in server.logs()
    assert httpx.get(server.url + "/v1/models").status_code == 401
    body = {"prompt": "two red foxes run\n", "adapter": "shout", "max_tokens": 32, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=60).json()
    assert answer["choices"][0]["text"].strip() == "TWO RED FOXES RUN"
    podman("healthcheck", "run", server.name)
    podman("exec", server.name, "sh", "-c", "! touch /x 2> /dev/null")
    podman("kill", "--signal", "STOP", server.name)  # a server that hangs
    assert (
        podman("exec", server.name, "sh", "-c", "python3 /opt/lora-serve/health.py > /dev/null; echo $?", timeout=60)
        != "0"
    )
    podman("kill", "--signal", "CONT", server.name)


def test_the_charts_pods_start_and_drain(image: str, tmp_path: Path) -> None:
    helm_python = pytest.importorskip("helm_python", reason="there is no Helm for this machine")
    port = free_port()
    release = f"test-{port}"
    values = {
        "image": {"repository": image, "tag": "latest", "pullPolicy": "Never"},
        "port": port,
        "keys": {"secret": ""},  # podman 4.3 mounts Secrets undecoded
        "insecure": True,
        "resources": {"limits": {"memory": "3Gi"}},
    }
    chart = helm_python.Chart.load(ROOT / "deploy" / "helm" / "lora-serve")
    texts = chart.render(values, name=release, namespace="default")
    needed = [texts[f"lora-serve/templates/{part}.yaml"] for part in ("options", "claim", "deployment")]
    # There is no Service here: the port is published on the host.
    published = f"containerPort: {port}\n              hostPort: {port}"
    text = "\n---\n".join(needed).replace(f"containerPort: {port}", published)
    (tmp_path / "pod.yaml").write_text(text)
    try:
        podman("kube", "play", str(tmp_path / "pod.yaml"))
        (name,) = [each for each in podman("ps", "--format", "{{.Names}}").split() if each.endswith("-server")]
        server = Container(name, f"http://127.0.0.1:{port}")
        server.wait_until_ready()
        assert "native kernels prebuilt for" in server.logs()
        assert server.inspect(".HostConfig.ReadonlyRootfs") is True
        assert server.inspect(".HostConfig.Memory") == 3 << 30
        body = {"prompt": "two red foxes run\n", "adapter": "shout", "max_tokens": 32, "temperature": 0}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"].strip() == "TWO RED FOXES RUN"
        podman("stop", "--time", "45", name)
        assert server.inspect(".State.ExitCode") == 0
    finally:
        podman("kube", "down", str(tmp_path / "pod.yaml"), check=False)
        podman("volume", "rm", "--force", *(f"{release}-{part}" for part in ("data", "options")), check=False)


def test_stopping_drains(server: Container, key: str) -> None:
    body = {"prompt": "two red foxes run\n", "max_tokens": 400, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("POST", server.url + "/v1/completions", json=body, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    podman("stop", "--time", "40", server.name)
    reader.join(10)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert any('"finish_reason":"length"' in line for line in lines)
    assert server.inspect(".State.ExitCode") == 0
