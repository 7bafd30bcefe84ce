"""The command line, and the life cycle of the server process: start, signals, drain, exit status."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers.models
import tokenizers.pre_tokenizers

from lora_serve.cli import main
from lora_serve.config import ServeConfig, is_public
from lora_serve.errors import BadRequest
from lora_serve.server import serve

FAKE_SERVER = Path(__file__).with_name("fake_server.py")

# --- options ---------------------------------------------------------------------------------------------------------


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"lora-serve \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in ServeConfig.model_fields.keys() - {"model"}:
        assert f"--{option.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["serve"], "MODEL: name the base model"),
        (["serve", "m", "--port", "70000"], "--port: Input should be less than or equal to 65535"),
        (["serve", "m", "--kv-cache-memory", "lots"], "--kv-cache-memory: could not parse"),
        (["serve", "m", "--config", "nowhere.yaml"], "config: there is no file nowhere.yaml"),
        (["adapter"], "subcommand is required"),
        (["store"], "subcommand is required"),
        (["key", "add", "../x"], "NAME: String should match"),
    ],
)
def test_an_invalid_option_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no_such: 1", "options.yaml, line 1: no_such: there is no such option"),
        ("port: x", "options.yaml, line 1: port: "),
        ("a: [", "expected"),
        ("- a", ""),
    ],
)
def test_an_invalid_config_file_is_reported_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert main(["serve", "m", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lora-serve: ")
    assert complaint in said
    assert "Traceback" not in said


def test_options_override_the_environment_which_overrides_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model: from-file\nport: 1\nmax_queue: 1\nmax_n: 1\n")
    monkeypatch.setenv("LORA_SERVE_PORT", "2")
    monkeypatch.setenv("LORA_SERVE_MAX_QUEUE", "2")
    config = ServeConfig(config=file, max_queue=3)
    assert (config.model, config.port, config.max_queue, config.max_n) == ("from-file", 2, 3, 1)
    monkeypatch.setenv("LORA_SERVE_CONFIG", str(file))
    assert ServeConfig().model == "from-file"


# --- where it listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.1", True),
        ("example.org", True),
        ("", True),
    ],
)
def test_public_addresses_are_recognised(host: str, public: bool) -> None:
    assert is_public(host) is public


def test_a_public_address_without_keys_is_refused() -> None:
    with pytest.raises(BadRequest, match="--insecure"):
        serve(ServeConfig(model="m", host="0.0.0.0"), load_tokenizer=unused, make_app=unused)


def test_a_port_in_use_is_reported_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadRequest, match=f"port {port}"):
            serve(ServeConfig(model="m", port=port), load_tokenizer=unused, make_app=unused)


def unused(*_: object) -> object:
    raise AssertionError("must not be called")


# --- life ------------------------------------------------------------------------------------------------------------


class Server:
    """The serving process with a fake engine, and a few questions to it."""

    def __init__(self, model: str, store: Path, *options: str) -> None:
        command = [sys.executable, str(FAKE_SERVER), model, f"--store={store}", *options]
        self.store = store
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def listening(self) -> int:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return self.port
        raise AssertionError(self.process.communicate()[1])

    def get(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse()

    def end(self, within: float) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=within)
        return self.process.returncode, errors

    def engines_running(self) -> list[int]:
        return [int(path.name) for path in self.store.iterdir() if Path(f"/proc/{path.name}").exists()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Server]]:
    started: list[Server] = []

    class Started(Server):
        def __init__(self, model: str, *options: str) -> None:
            super().__init__(model, tmp_path, *options)
            started.append(self)

    yield Started
    for server in started:
        server.process.kill()
        server.process.communicate()


def wait_until_no_engine_runs(server: Server) -> None:
    deadline = time.monotonic() + 3
    while server.engines_running():
        assert time.monotonic() < deadline, "an engine outlived its server"
        time.sleep(0.02)


def test_sigterm_makes_ready_fail_finishes_streams_and_exits_0(start: type[Server]) -> None:
    server = start("fake")
    server.listening()
    ready = server.get("/ready")
    assert (ready.status, ready.read()) == (200, b"fake tokenizer")
    stream = server.get("/stream?400")
    assert stream.readline() == b"token\n"
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert server.get("/ready").status == 503
    assert stream.read().endswith(b"length\n")
    status, errors = server.end(within=5)
    assert status == 0, errors
    assert server.engines_running() == []


def test_streams_that_outlast_the_drain_timeout_end_with_an_error(start: type[Server]) -> None:
    server = start("fake", "--drain_timeout=0.3")
    server.listening()
    stream = server.get("/stream?1000000")
    assert stream.readline() == b"token\n"
    server.process.send_signal(signal.SIGTERM)
    assert stream.read().endswith(b"error\n")
    assert server.end(within=5)[0] == 0


def test_a_second_signal_stops_at_once(start: type[Server]) -> None:
    server = start("fake")
    server.listening()
    stream = server.get("/stream?1000000")
    stream.readline()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.end(within=1)[0] == 128 + signal.SIGTERM
    wait_until_no_engine_runs(server)


def test_a_signal_to_the_process_group_drains_as_well(start: type[Server]) -> None:
    server = start("fake")
    server.listening()
    stream = server.get("/stream?200")
    stream.readline()
    for pid in [*server.engines_running(), server.process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert stream.read().endswith(b"length\n")
    assert server.end(within=5)[0] == 0


def test_a_signal_during_start_stops_the_server(start: type[Server]) -> None:
    server = start("slow")
    deadline = time.monotonic() + 10
    while not server.engines_running():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.process.send_signal(signal.SIGINT)
    assert server.end(within=5)[0] == 0
    assert server.engines_running() == []


@pytest.mark.parametrize(
    ("model", "reason"), [("unsupported", "no such architecture"), ("no-tokenizer", "there is no tokenizer")]
)
def test_a_failed_start_reports_the_reason_and_exits_1(start: type[Server], model: str, reason: str) -> None:
    server = start(model)
    status, errors = server.end(within=10)
    assert status == 1
    assert errors.endswith(f"{reason}\n")
    assert "Traceback" not in errors
    wait_until_no_engine_runs(server)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_loaded_without_torch(tmp_path: Path) -> None:
    vocabulary = tokenizers.models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[0, 1, 1]\n", done.stderr
    assert done.stderr == ""


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from lora_serve.cli import load_tokenizer
from lora_serve.config import ServeConfig, is_public
print(load_tokenizer(ServeConfig(model=sys.argv[1])).encode("one two two", add_special_tokens=False))
"""


def test_a_missing_model_folder_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "./no-such-folder"]) == 1
    assert capsys.readouterr().err.endswith("lora-serve: there is no folder ./no-such-folder\n")
