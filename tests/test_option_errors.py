"""Operators' mistakes: each is said with its place and what may have been meant, and without a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import DEMO

from lora_serve.cli import main
from lora_serve.config import ServeConfig, Size
from lora_serve.errors import BadRequest, ModelUnsupported
from lora_serve.option_errors import check_environment, check_model


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("LORA_SERVE_PORT", "LORA_SERVE_CONFIG", "LORA_SERVE_API_KEY_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "x", "--prot", "1"], "there is no option --prot; did you mean --port?"),
        (["serve", "x", "--prot=1"], "there is no option --prot; did you mean --port?"),
        (["serve", "x", "--zzz"], "there is no option --zzz"),
        (["adapter", "list", "--ulr", "x"], "there is no option --ulr; did you mean --url?"),
        (["serve", "a", "b"], "one argument too many: b"),
        (
            ["serv", "x"],
            "there is no command serv; did you mean serve?; there are serve, adapter, train, top, store, key",
        ),
        (["serve", "x", "--port", "many"], "--port: Input should be a valid integer"),
        (["serve"], "MODEL: name the base model"),
        (["serve", "x", "--config", "no.yaml"], "config: there is no file no.yaml"),
        (["serve", "x", "--port"], "--port: expected one argument"),
        (["adapter"], "a subcommand is required: list, show, "),
        (["serve", "x", "--allow-origin", "https://a.example,b"], "--allow-origin: b is not an origin"),
    ],
)
def test_a_mistake_on_the_command_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-serve: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# ports\nport: 1\nprot: 2\n", "options.yaml, line 3: prot: there is no such option; did you mean port?"),
        ("port: many\n", "options.yaml, line 1: port: Input should be a valid integer"),
        ("port: 1\nhost: x\nport: 2\n", "options.yaml, line 3: port: it is in line 1 already"),
        ("- port\n", "options.yaml, line 1: options are written as NAME: VALUE, one a line"),
        ("port: [1\nx: 2\n", 'while parsing a flow sequence in "options.yaml", line 1'),
    ],
)
@pytest.mark.parametrize("how", ["--config", "--config=", "environment"])
def test_a_mistake_in_the_yaml_file_has_its_line(
    content: str, said: str, how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("options.yaml").write_text(content)
    arguments = {"--config": ["--config", "options.yaml"], "--config=": ["--config=options.yaml"]}.get(how, [])
    if how == "environment":
        monkeypatch.setenv("LORA_SERVE_CONFIG", "options.yaml")
    assert main(["serve", "x", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"lora-serve: {said}")


def test_the_strongest_place_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("options.yaml").write_text("port: 1\n")
    monkeypatch.setenv("LORA_SERVE_PORT", "many")
    assert main(["serve", "x", "--config", "options.yaml"]) == 2
    assert main(["serve", "x", "--config", "options.yaml", "--port", "few"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": Input")[0] for line in lines] == [
        "lora-serve: environment: LORA_SERVE_PORT",
        "lora-serve: --port",
    ]


def test_a_variable_that_is_no_option_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SERVE_API_KEYFILE", "keys.yaml")  # it would serve everybody
    assert main(["serve", "x"]) == 2
    said = "environment: there is no option LORA_SERVE_API_KEYFILE; did you mean LORA_SERVE_API_KEY_FILE?"
    assert capsys.readouterr().err == f"lora-serve: {said}\n"


@pytest.mark.parametrize(
    "written", ["https://a.example,https://b.example", '["https://a.example", "https://b.example"]']
)
def test_a_list_in_the_environment_has_commas_or_is_json(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SERVE_ALLOW_ORIGIN", written)
    monkeypatch.setenv("LORA_SERVE_ADAPTER_ROOTS", "/one")
    config = ServeConfig(model="x")
    assert config.allow_origin == ["https://a.example", "https://b.example"]
    assert config.adapter_roots == [Path("/one")]
    monkeypatch.setenv("LORA_SERVE_ALLOW_ORIGIN", '["https://a.example"')
    assert main(["serve", "x"]) == 2


def test_what_kubernetes_sets_for_a_service_of_the_same_name_is_no_mistake() -> None:
    links = {
        "LORA_SERVE_PORT": "tcp://10.0.0.1:80",
        "LORA_SERVE_SERVICE_HOST": "10.0.0.1",
        "LORA_SERVE_SERVICE_PORT": "80",
        "LORA_SERVE_SERVICE_PORT_HTTP": "80",
        "LORA_SERVE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "LORA_SERVE_PORT_80_TCP_ADDR": "10.0.0.1",
        "LORA_SERVE_CANARY_SERVICE_HOST": "10.0.0.1",
        "LORA_SERVE_CANARY_PORT": "tcp://10.0.0.1:80",
        "LORA_SERVE_CANARY_PORT_80_TCP": "tcp://10.0.0.1:80",
    }
    environment = links | {"LORA_SERVE_HOST": "0.0.0.0", "LORA_SERVE_KERNEL_FLAGS": "-O1", "PATH": "/"}
    check_environment(environment)
    assert "LORA_SERVE_PORT" not in environment
    with pytest.raises(BadRequest):
        check_environment({"LORA_SERVE_SERVICE": "x"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models/qwem", "there is no folder models/qwem; did you mean models/qwen?"),
        ("./models/qwem", "there is no folder ./models/qwem; did you mean models/qwen?"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("a/b/c", "there is no folder a/b/c"),
        ("file", "file is a file; name the folder of the model"),
    ],
)
def test_a_misspelt_path_is_no_hub_id(name: str, said: str) -> None:
    Path("models/qwen").mkdir(parents=True)
    Path("file").touch()
    with pytest.raises(ModelUnsupported) as error:
        check_model(name)
    assert error.value.message == said


@pytest.mark.parametrize("name", ["models/qwen", "gpt2", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_folders_and_hub_ids_are_models(name: str) -> None:
    Path("models/qwen").mkdir(parents=True)
    Path("Qwen").mkdir()
    check_model(name)


def test_sizes_are_shown_as_one_writes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert [str(Size(value)) for value in (2 << 30, 62 << 20, 8 << 10, 1000)] == ["2GiB", "62MiB", "8KiB", "1000"]
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "(default: 2GiB)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "key add", "store list", "adapter upload", "top"])
def test_help_names_no_default_where_there_is_none_and_none_twice(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in shown
    assert "(default: )" not in shown
    assert "(default: [])" not in shown
    assert not re.search(r"\(default: [^)]*\) \(default:", shown)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-key-file", "nowhere.yaml"], "the key file nowhere.yaml cannot be read: No such file or directory"),
        (["--chat-template", "nowhere"], "the chat template nowhere cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_not_there_is_said_in_one_line_among_the_log(options: list[str], said: str) -> None:
    command = [sys.executable, "-m", "lora_serve", "serve", str(DEMO), "--port", "0", "--log-level", "warning"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(DEMO.parents[1])}
    ended = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 1
    of_engine = re.compile("torchao|torch/utils|engine")  # libraries that it may find there
    assert [line for line in ended.stderr.splitlines() if not of_engine.search(line)] == [f"lora-serve: {said}"]
