"""`lora-serve train` against the application over a fake engine, which lies here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fake_training import COMPLETIONS, PREFERENCES, TrainingApp
from starlette.responses import JSONResponse

from lora_serve.cli import main


class ServedApp:
    """The application on a free port, in a thread.

    Attributes:
        away: how often a question about a job is answered as by a server that starts.
    """

    def __init__(self, store: Path) -> None:
        self.app = TrainingApp(store)
        self.away = 0
        self._server = uvicorn.Server(
            uvicorn.Config(self._answer, port=0, log_config=None, ws="none", interface="asgi3")
        )
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> ServedApp:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if self.away and "/jobs/ftjob-" in scope.get("path", ""):
            self.away -= 1
            await JSONResponse({"error": {"message": "the server is starting"}}, 503)(scope, receive, send)
        else:
            await self.app.app(scope, receive, send)

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedApp]:
    with ServedApp(tmp_path / "store") as server:
        yield server


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_a_file_becomes_an_adapter(served: ServedApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, validation = (write(tmp_path / name, COMPLETIONS) for name in ("squares.v2.jsonl", "held-out.jsonl"))
    options = ["--epochs", "2", "--batch-size", "6", "--rank", "4", "--learning-rate", "1e-3", "--seed", "5"]
    assert main(["train", file, "--validation", validation, *options, "--url", served.url, "--interval", "0.01"]) == 0
    shown = capsys.readouterr()
    assert "trained and published squares@digest0" in shown.out
    assert '"model": "squares"' in shown.out
    assert shown.err.count("training loss=") == 4
    assert "Step 4/4: training loss=0.5000, validation loss=1.0000" in shown.err
    jobs = served.app.app.state.services.jobs.store.list()
    assert (jobs[0].settings.r, jobs[0].settings.seed, jobs[0].trainer.learning_rate) == (4, 5, 1e-3)


def test_a_server_that_is_away_for_a_moment_does_not_end_it(served: ServedApp, tmp_path: Path) -> None:
    served.away = 3
    file = write(tmp_path / "a.jsonl", COMPLETIONS)
    assert main(["train", file, "--epochs", "1", "--url", served.url, "--interval", "0.01"]) == 0
    assert served.away == 0


def test_preferences_are_learnt_by_their_method(
    served: ServedApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "replies.jsonl", PREFERENCES)
    more = ["--method", "dpo", "--beta", "0.5", "--epochs", "1", "--name", "polite"]
    assert main(["train", file, *more, "--url", served.url, "--interval", "0.01"]) == 0
    assert "published polite@" in capsys.readouterr().out
    assert main(["train", file, "--url", served.url, "--interval", "0.01"]) == 1
    assert "method supervised learns from" in capsys.readouterr().err


def test_what_goes_wrong_is_one_line(served: ServedApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "none.jsonl")], "cannot be read"),
        ([write(tmp_path / "bad.jsonl", [json.dumps({"a": 1})])], "no valid training data"),
        ([write(tmp_path / "a.jsonl", COMPLETIONS), "--beta", "1"], "--beta is of --method dpo"),
        ([write(tmp_path / "a b.jsonl", COMPLETIONS)], "a name is 1 to 64 letters"),
    ):
        assert main(["train", *arguments, "--url", served.url, "--interval", "0.01"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lora-serve: ")
        assert message in line
