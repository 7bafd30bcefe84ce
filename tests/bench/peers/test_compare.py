"""Servers are compared under the same load in turns; started ones are stopped, their footprint is reported."""

from __future__ import annotations

import json
import math
import shlex
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bench.peers import compare
from bench.peers.peer_server import Peer, started_peer
from bench.serving.client import Server
from bench.serving.launch import launched
from bench.serving.load import Load

FAKE = (sys.executable, str(Path(__file__).parents[1] / "serving" / "fake_openai.py"))
START = f"{shlex.join(FAKE)} --port {{port}}"


def test_each_load_runs_on_all_servers_before_the_next_load() -> None:
    servers = {name: Server(f"http://{name}", "base", "model") for name in ("ours", "bare")}
    loads = {"none ×2": Load("none", clients=2), "one ×2": Load("one", clients=2)}
    found = compare.scenarios(servers, {"ours": ("a", "b"), "bare": ()}, loads)
    assert list(found) == ["ours none ×2", "bare none ×2", "ours one ×2"]
    assert found["ours one ×2"] == (servers["ours"], Load("one", ("a", "b"), clients=2))
    assert found["ours none ×2"][1].jobs() == found["bare none ×2"][1].jobs()


def test_the_loads_are_every_mix_with_every_number_of_clients() -> None:
    loads = compare.loads_of(compare.parse(["--server=a=http://a", "--clients=8,1", "--requests=2", "--output=32-96"]))
    assert list(loads) == ["none ×8", "one ×8", "distinct ×8", "none ×1", "one ×1"]
    assert [load.requests for load in loads.values()] == [16, 16, 16, 2, 2]
    assert {load.output for load in loads.values()} == {(32, 96)}


def test_options_of_a_server_are_by_its_name() -> None:
    args = compare.parse(
        ["--server=a=http://a?x=1", "--start=b=serve --x=y --port {port}", "--model=b=m", "--adapter-field=b=adapter"]
    )
    assert (args.server, args.start) == ({"a": "http://a?x=1"}, {"b": "serve --x=y --port {port}"})
    assert (args.model, args.adapter_field) == ({"b": "m"}, {"b": "adapter"})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "name some servers"),
        (["--server", "a=http://a", "--server", "a=http://b"], "each once"),
        (["--server", "http://a"], "not NAME=VALUE"),
        (["--start", "a=serve --port 80"], "no {port}"),
        (["--server", "a=http://a", "--model", "b=m"], "--model names a server that is not there"),
        (["--server", "a=http://a", "--adapter-field", "a=lora"], "one of the fields"),
    ],
)
def test_an_inconsistent_command_line_is_refused(
    given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.parse(given)
    assert complaint in capsys.readouterr().err


def test_a_running_and_a_started_server_are_compared_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "IDLE", 0.3)
    sizes = f"--mix none,distinct --clients 2,1 --requests 2 --prompt 4 --output 3 --repeats 2 --png {tmp_path}/a.png"
    with launched([], command=FAKE, timeout=60) as url:
        compare.main(
            ["--server", f"one={url}", "--start", f"two={START}", "--adapter-field", "one=adapter", *sizes.split()]
        )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    printed, told = capsys.readouterr()
    turns = [line.split(maxsplit=2)[2].partition(":")[0] for line in told.splitlines() if "tok/s" in line]
    forwards = ["one none ×2", "two none ×2", "one distinct ×2", "two distinct ×2", "one none ×1", "two none ×1"]
    assert turns == forwards + forwards[::-1]
    content = json.loads(printed.splitlines()[-1])
    assert set(content["results"]) == set(forwards)
    assert all(each["median"]["errors"] == 0 for each in content["results"].values())
    one, two = content["footprints"]["one"], content["footprints"]["two"]
    assert one == {"ready": None, "memory": None, "idle": None}
    assert two["ready"] > 0
    assert 1e7 < two["memory"] < 1e9
    assert 0 <= two["idle"] < 1
    assert "| tok/s · TTFT s | none ×2 | distinct ×2 |" in " ".join(printed.split())


def test_a_started_server_answers_and_is_stopped() -> None:
    with started_peer(START, timeout=60) as peer:
        before = peer.cpu()
        with urllib.request.urlopen(f"{peer.url}/v1/models", timeout=5) as answer:
            assert answer.status == 200
        assert peer.cpu() >= before > 0
        assert peer.ready > 0
    assert math.isnan(peer.memory())
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{peer.url}/v1/models", timeout=1)


def test_a_server_that_cannot_start_raises_with_its_output() -> None:
    with pytest.raises(RuntimeError, match="this cannot start"), started_peer(f"{START} --fail", timeout=60):
        pass


def test_the_footprint_of_a_server_not_started_here_is_unknown() -> None:
    peer = Peer("http://127.0.0.1:9")
    assert math.isnan(peer.memory())
    assert math.isnan(peer.cpu())
