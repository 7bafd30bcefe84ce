"""`lora-serve train`: training data and a fine-tuning job for a running server, followed until there is an adapter."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_serve.errors import BadRequest, ServeError, Unavailable
from lora_serve.names import check_name
from lora_serve.remote import BINARY, RemoteCommand

FINISHED = ("succeeded", "failed", "cancelled")
PATIENCE = 120.0  # seconds that a server may be away while its job is followed

Job = dict[str, Any]


class TrainCommand(RemoteCommand):
    """Train an adapter on a JSONL file and publish it, on a server that has --training-memory."""

    path: CliPositionalArg[Path] = Field(description="JSONL file: chat, prompt and completion, or preferences (dpo)")
    name: str | None = Field(None, description="name of the adapter (default: the file's own)")
    method: Literal["supervised", "dpo"] = Field("supervised", description="learn from replies, or from preferences")
    validation: Path | None = Field(None, description="JSONL file that the adapter is measured with after each epoch")
    epochs: int | None = Field(None, ge=1, description="times to go through the file (default: by its size)")
    batch_size: int | None = Field(None, ge=1, description="examples of a step (default: by the file's size)")
    learning_rate: float | None = Field(None, gt=0, description="after the warm-up (default: 2e-4; dpo 2e-5)")
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="share of all steps in which the rate grows")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="how the learning rate falls (default: linear)"
    )
    rank: int | None = Field(None, ge=1, description="of the LoRA adapter (default: 16)")
    alpha: float | None = Field(None, gt=0, description="its lora_alpha (default: 32)")
    beta: float | None = Field(None, gt=0, description="of dpo (default: 0.1)")
    max_length: int | None = Field(None, ge=2, description="tokens, beyond which an example is cut")
    interval: float = Field(0.5, gt=0, description="seconds between two looks at the job")
    seed: int | None = Field(None, ge=0, description="of the order of the examples and the first weights")

    def run(self) -> None:
        name = check_name(self.name or self.path.name.split(".")[0])
        self.ask("GET", "/v1/fine_tuning/jobs?limit=1")  # or it says that it does not train, before anything is sent
        model = str(self.ask("GET", "/v1/models")["data"][0]["id"])
        job = self.ask("POST", "/v1/fine_tuning/jobs", json=self._body(model, name))
        console = Console(highlight=False, markup=False, stderr=True)
        try:
            job = self._follow(job, console)
        except KeyboardInterrupt:
            print(f"the job goes on as {job['id']}", file=sys.stderr)
            return
        if job["status"] != "succeeded":
            error = job.get("error") or {}
            raise ServeError(f"job {job['id']} has {job['status']}: {error.get('message', 'it was ended by somebody')}")
        self._print_result(job, name)

    def _body(self, model: str, name: str) -> Job:
        """The body of the job's creation; uploads the files."""
        numbers: Job = {"n_epochs": self.epochs, "batch_size": self.batch_size}
        if self.method == "dpo":
            numbers |= {"beta": self.beta}
        elif self.beta is not None:
            raise BadRequest("--beta is of --method dpo", param="beta")
        body = {
            "model": model,
            "adapter": name,
            "training_file": self._upload(self.path),
            "validation_file": None if self.validation is None else self._upload(self.validation),
            "seed": self.seed,
            "max_length": self.max_length,
            "method": {"type": self.method, self.method: {"hyperparameters": numbers}},
            "lora": {"r": self.rank, "lora_alpha": self.alpha},
            "trainer": {
                "learning_rate": self.learning_rate,
                "warmup_ratio": self.warmup_ratio,
                "lr_scheduler_type": self.schedule,
            },
        }
        return {key: value for key, value in body.items() if value is not None}

    def _upload(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                sent = {"file": (path.name, file, BINARY)}
                return str(self.ask("POST", "/v1/files", data={"purpose": "fine-tune"}, files=sent)["id"])
        except OSError as error:
            raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from error

    def _follow(self, job: Job, console: Console) -> Job:
        """Show a job until it has finished: a bar on a terminal, otherwise a line per event."""
        where = f"/v1/fine_tuning/jobs/{job['id']}"
        columns = (
            TextColumn("{task.description:<17}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        told: set[str] = set()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(job["status"], total=None, loss="")
            answered = time.monotonic()
            while True:
                try:
                    job, events = self.ask("GET", where), self._new_events(where, told)
                except Unavailable:  # the job goes on when the server is back
                    if time.monotonic() - answered > PATIENCE:
                        raise
                    progress.update(bar, description="no answer")
                    time.sleep(self.interval)
                    continue
                answered = time.monotonic()
                for event in events:
                    if event["type"] == "metrics":
                        step, steps = event["data"]["step"], event["data"]["total_steps"]
                        loss = f"loss {event['data']['train_loss']:.4f}"
                        progress.update(bar, completed=step, total=steps, loss=loss)
                    if event["type"] != "metrics" or not console.is_terminal or "valid_loss" in event["data"]:
                        console.print(event["message"])
                progress.update(bar, description=job["status"])
                if job["status"] in FINISHED:
                    return job
                time.sleep(self.interval)

    def _new_events(self, where: str, told: set[str]) -> list[Job]:
        """Events that were not told yet, oldest first."""
        found: list[Job] = []
        after = ""
        while True:
            page = self.ask("GET", f"{where}/events?limit=100{after}")
            new = [event for event in page["data"] if event["id"] not in told]
            found += new
            if len(new) < len(page["data"]) or not page["has_more"]:
                told.update(event["id"] for event in found)
                return found[::-1]
            after = f"&after={page['data'][-1]['id']}"

    def _print_result(self, job: Job, name: str) -> None:
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "…"}]}, ensure_ascii=False)
        print(f"trained and published {job['adapter']}")
        print(f"curl {self.url.rstrip('/')}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
