"""A real server with sources: an object store, a web server that is slow or sends archives, and a folder."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from moto.server import ThreadedMotoServer
from server_process import ADAPTERS, ServerProcess, until
from web_server import Handler, WebServer

from demo.tasks import heldout_prompts, prompt

pytestmark = pytest.mark.slow  # make sources-check
FILES = {path.name: path.read_bytes() for path in (ADAPTERS / "reverse").iterdir()}
PROMPT = prompt(heldout_prompts(1)[0])


def pack(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


class Served(NamedTuple):
    server: ServerProcess
    web: WebServer
    bucket: Any
    store: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("sources")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with pytest.MonkeyPatch.context() as patch, WebServer() as web:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*moto.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="adapters")
        for name, content in FILES.items():
            client.put_object(Bucket="adapters", Key=f"prod/stored/{name}", Body=content)
        sources = ("s3=s3://adapters/prod", f"web=http://{web.host}/{{name}}.tar.gz")
        options = [word for source in sources for word in ("--adapter-source", source)]
        (root / "watched" / "present").mkdir(parents=True)
        for name, content in FILES.items():
            (root / "watched" / "present" / name).write_bytes(content)
        options += ["--source-timeout", "20", "--adapters", str(root / "watched"), "--watch"]
        with ServerProcess(root / "store", *options) as server:
            yield Served(server, web, client, root / "store")
    moto.stop()


def ask(server: ServerProcess, adapter: str) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "adapter": adapter}
    return server.http.post("/v1/completions", json=body)


def test_the_first_requests_for_an_adapter_fetch_it_once(served: Served) -> None:
    server = served.server
    upload = [("files", (name, content)) for name, content in FILES.items()]
    server.http.post("/v1/adapters", data={"name": "uploaded"}, files=upload).raise_for_status()
    expected = ask(server, "uploaded").json()["choices"][0]["text"]
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: ask(server, "stored"), range(12)))
    assert [answer.status_code for answer in answers] == 12 * [200], answers[0].text
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}
    assert server.metric("lora_serve_source_fetches_total") == 1
    assert server.metric("lora_serve_source_bytes_total") == sum(map(len, FILES.values()))
    digest = server.http.get("/v1/adapters/uploaded").json()["versions"][0]["digest"]
    assert server.http.get("/v1/adapters/stored").json()["versions"][0]["digest"] == digest


def test_what_was_deleted_or_unloaded_is_fetched_again(served: Served) -> None:
    server = served.server
    assert ask(server, "stored").status_code == 200
    for remove in (
        lambda: server.http.delete("/v1/adapters/stored"),
        lambda: server.http.post("/v1/unload_lora_adapter", json={"lora_name": "stored"}),
    ):
        remove().raise_for_status()
        assert "stored" not in server.http.get("/v1/models").text
        assert ask(server, "stored").status_code == 200


def test_an_upload_that_was_unloaded_is_not_replaced_by_a_sources(served: Served) -> None:
    server = served.server
    for name, content in FILES.items():
        served.bucket.put_object(Bucket="adapters", Key=f"prod/mine/{name}", Body=content)
    files = {name: (ADAPTERS / "count" / name).read_bytes() for name in FILES}
    upload = [("files", (name, content)) for name, content in files.items()]
    server.http.post("/v1/adapters", data={"name": "mine"}, files=upload).raise_for_status()
    before = server.http.get("/v1/adapters/mine").json()["versions"][0]["digest"]
    server.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).raise_for_status()
    assert ask(server, "mine").status_code == 404
    server.http.post("/v1/adapters/mine/load").raise_for_status()
    assert server.http.get("/v1/adapters/mine").json()["versions"][0]["digest"] == before


def test_an_archive_is_unpacked_by_the_compiler(served: Served) -> None:
    server, web = served.server, served.web
    web.answers["/packed.tar.gz"] = pack({f"run/{name}": content for name, content in FILES.items()})
    assert ask(server, "packed").status_code == 200
    web.answers["/bomb.tar.gz"] = pack(FILES | {"adapter_model.safetensors": bytes(40 << 20)})
    web.answers["/escape.tar.gz"] = pack({"../adapter_config.json": b"{}"})
    for name, reason in (("bomb", "more than 100 times its size"), ("escape", "a path that leads out")):
        for _ in range(2):
            answer = ask(server, name)
            assert (answer.status_code, reason in answer.text) == (422, True), answer.text
        assert web.paths.count(f"/{name}.tar.gz") == 1  # remembered
    assert list((served.store / "staging").iterdir()) == []


def test_a_missing_adapter_is_a_404_that_says_where_was_looked(served: Served) -> None:
    answer = ask(served.server, "nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "adapter nobody does not exist; looked in sources s3, web"
    answer = served.server.http.post("/v1/completions", json={"prompt": "x", "model": "nobody"})
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "looked in sources s3, web" in answer.text


def test_a_slow_source_delays_nobody_else(served: Served) -> None:
    server, web = served.server, served.web
    packed = pack(FILES)

    def drip(answer: Handler) -> None:
        answer.send(packed[:1000], length=len(packed))
        time.sleep(3.0)
        answer.wfile.write(packed[1000:])

    web.answers["/slow.tar.gz"] = drip
    ask(server, "stored")
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(ask, server, "slow")
        while "/slow.tar.gz" not in web.paths:
            time.sleep(0.01)
        times = []
        while not waiting.done() and len(times) < 200:
            begun = time.monotonic()
            assert ask(server, "stored").status_code == 200
            times.append(time.monotonic() - begun)
        assert waiting.result().status_code == 200
    assert len(times) > 3
    assert max(times) < 2.5  # none waited for the fetch


def test_a_client_that_leaves_does_not_end_a_fetch_and_secrets_are_in_no_log(served: Served) -> None:
    server, web = served.server, served.web
    packed = pack(FILES)

    def late(answer: Handler) -> None:
        time.sleep(0.3)
        answer.send(packed)

    web.answers["/late.tar.gz"] = late
    with pytest.raises(Exception, match="timed out"):
        server.http.post("/v1/completions", json={"prompt": "x", "adapter": "late"}, timeout=0.1)
    deadline = time.monotonic() + 10
    while "late" not in server.http.get("/v1/models").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert web.paths.count("/late.tar.gz") == 1
    assert "hush-hush" not in "".join(server.log)
    assert any("publish late" in line and "web/late" in line for line in server.log)


def test_a_watched_folder_is_followed(served: Served) -> None:
    server, folder = served.server, served.store.parent / "watched"
    assert ask(server, "present").status_code == 200
    shutil.copytree(folder / "present", folder / "arrived")
    until(lambda: ask(server, "arrived").status_code == 200, 20)
    shutil.rmtree(folder / "present")
    until(lambda: ask(server, "present").status_code == 404, 20)
    assert ask(server, "arrived").status_code == 200
