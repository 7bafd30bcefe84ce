"""What a hostile or careless user asks of training runs is refused by name; neither serving nor others notice."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_session import TrainingSession, batch, create

from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.tensor_folder import write_folder
from lora_serve.engine.training.run_checkpoint import RunCheckpoint
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trained_files import peft_tensors
from lora_serve.errors import BadRequest, StoreUnusable
from lora_serve.request import Finished
from lora_serve.training_messages import (
    CloseRun,
    CreateRun,
    ExportRun,
    ForwardBackward,
    OptimizerStep,
    RestoreRun,
    RunSettings,
    SaveRun,
    TrainingExample,
)

P_TUNING = {"peft_type": "P_TUNING", "num_virtual_tokens": 4}
LSTM = {**P_TUNING, "encoder_reparameterization_type": "LSTM"}
PROJECTION = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": True}


def trained(session: TrainingSession, run: str) -> TrainableAdapter:
    """The adapter of a run."""
    assert session.engine._training is not None
    return session.engine._training._runs[run].trained


def test_numbers_that_would_spoil_the_weights_are_refused_without_effect(session: TrainingSession) -> None:
    session.call(create("run"))
    session.call(ForwardBackward("run", batch(1)))
    adapter = trained(session, "run")
    before = adapter.masters.clone(), adapter.gradients.clone()
    refused = [OptimizerStep("run", rate) for rate in (math.nan, math.inf, -1.0, 1e300)]
    for operation in refused:
        assert session.failure(operation).param == "learning_rate"
    assert session.failure(OptimizerStep("run", 1e-3, eps=1e-60)).param == "eps"
    assert adapter.masters.equal(before[0])
    assert adapter.gradients.equal(before[1])
    assert session.failure(create("infinite", lora_alpha=1e300)).param == "lora_alpha"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"target_modules": [f"x{index}" for index in range(5000)]}, "target_modules"),
        ({"target_modules": ["x" * 5000]}, "target_modules"),
        ({"rank_pattern": {f"x{index}": 4 for index in range(5000)}}, "rank_pattern"),
        ({"peft_type": "IA3", "feedforward_modules": [f"x{index}" for index in range(5000)]}, "feedforward_modules"),
        ({"init_lora_weights": "x" * 5000}, "init_lora_weights"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 128}, "num_virtual_tokens"),
        ({**P_TUNING, "encoder_hidden_size": 10**9}, "encoder_hidden_size"),
        ({**P_TUNING, "encoder_hidden_size": 10**60}, "encoder_hidden_size"),
        ({**P_TUNING, "encoder_hidden_size": 1400}, "encoder_hidden_size"),  # more than all memory
        ({**LSTM, "encoder_num_layers": 10**6}, "encoder_num_layers"),
        ({**LSTM, "encoder_hidden_size": 10**9}, "encoder_hidden_size"),
        ({**PROJECTION, "encoder_hidden_size": 10**9}, "encoder_hidden_size"),
        ({**PROJECTION, "encoder_hidden_size": 1 << 16}, "num_virtual_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_endless_settings_are_refused_by_their_field_in_a_short_message(
    session: TrainingSession, settings: dict[str, Any], param: str
) -> None:
    failure = session.failure(CreateRun("refused", RunSettings(**settings)))
    assert failure.param == param
    assert len(failure.message) < 500


def test_names_that_no_module_has_are_counted_and_not_all_repeated(session: TrainingSession) -> None:
    failure = session.failure(create("refused", target_modules=["q_proj", *(f"x{index}" for index in range(4000))]))
    assert failure.param == "target_modules"
    assert "x0" in failure.message
    assert "q_proj, x" not in failure.message
    assert len(failure.message) < 500


def test_a_batch_without_end_is_refused_before_it_is_read(session: TrainingSession) -> None:
    session.call(create("run"))
    one = TrainingExample([5], [6], {"weights": [1.0]})
    assert "65537 examples are too many" in session.failure(ForwardBackward("run", [one] * 65537)).message
    long = TrainingExample([5] * 300_000, [6] * 300_000, {"weights": [1.0] * 300_000})
    assert "1200000 tokens are too many" in session.failure(ForwardBackward("run", [long] * 4)).message


def test_which_example_has_a_token_that_there_is_not(session: TrainingSession) -> None:
    session.call(create("run"))
    wrong = TrainingExample([1 << 30], [1], {"weights": [1.0]})
    assert session.failure(ForwardBackward("run", [*batch(2), wrong])).param == "examples.2.tokens"


def test_training_that_may_have_all_the_time_leaves_steps_to_streams(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path, training_share=1.0)
    session.call(create("run"))
    calls = [session.submit(ForwardBackward("run", batch(8, seed=seed, length=100))) for seed in range(25)]
    session.send("stream", [5, 6, 7], max_tokens=4)
    while not any(isinstance(event, Finished) for event in session.events.get("stream", [])):
        session.step()
    ended = sum(call in session.replies for call in calls)
    session.engine.close()
    assert ended < len(calls)


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True}]
)
def test_what_reads_all_weights_is_not_done_in_the_loop(
    session: TrainingSession, settings: dict[str, Any], tmp_path: Path
) -> None:
    call = session.submit(create("run", **settings))
    runs = session.engine._training
    assert runs is not None
    assert not runs.pending  # there is nothing for the loop to do
    session.answer(call)
    session.train("run", range(1))
    wanted = peft_tensors(trained(session, "run"))
    call = session.submit(ExportRun("run", str(tmp_path / "peft")))
    session.train("run", range(1))  # does not change what is being written
    session.answer(call)
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(wanted[key]) for key, tensor in found.items())


def test_a_pass_that_could_not_begin_leaves_none_of_its_calls(session: TrainingSession) -> None:
    session.call(create("run"))
    assert session.engine._training is not None
    norm = session.engine._training._base._model.get_submodule("model.norm")

    def out_of_memory(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError

    hook = norm.register_forward_hook(out_of_memory)
    assert session.failure(ForwardBackward("run", batch(1))).message.startswith("training ran out of memory")
    assert session.call(ForwardBackward("run", batch(1)))["tokens"] == 12


def test_short_operations_without_end_do_not_keep_others_passes_waiting(session: TrainingSession) -> None:
    for name in ("greedy", "patient"):
        session.call(create(name))
    runs, ticks = session.engine._training, itertools.count()
    assert runs is not None
    clock, runs._clock = runs._clock, lambda: next(ticks) * 0.2  # a quantum takes so many seconds
    greedy = [session.submit(OptimizerStep("greedy", 1e-3)) for _ in range(60)]
    patient = session.submit(ForwardBackward("patient", batch(1)))
    session.answer(patient)
    ended = sum(call in session.replies for call in greedy)
    session.answer(greedy[-1])
    runs._clock = clock
    assert 0 < ended < 40


def test_a_run_can_be_closed_while_a_thread_computes_what_it_begins_with(session: TrainingSession) -> None:
    call = session.submit(create("run", init_lora_weights="pissa"))
    assert session.call(CloseRun("run")) is None
    assert session.answer(call).kind == "run_not_found"
    assert session.call(create("run", init_lora_weights="olora"))["steps"] == 0


def test_a_run_that_a_thread_could_not_begin_is_gone(session: TrainingSession, tmp_path: Path) -> None:
    runs = session.engine._training
    assert runs is not None
    calls = [session.submit(create("run", use_dora=True)), session.submit(SaveRun("run", str(tmp_path / "saved")))]
    runs._runs["run"].closed = True  # the thread raises
    assert session.answer(calls[0]).kind == "bad_request"
    assert session.answer(calls[1]).kind == "run_not_found"
    assert session.call(create("run"))["steps"] == 0


def test_weights_that_a_step_made_infinite_are_not_exported(session: TrainingSession, tmp_path: Path) -> None:
    session.call(create("run", init_lora_weights="olora"))
    trained(session, "run").masters[0] = math.inf  # by a step at an immense rate
    assert "are not finite" in session.failure(ExportRun("run", str(tmp_path / "peft"))).message
    assert not (tmp_path / "peft").exists()


def test_a_saved_run_is_not_restored_as_another_method_of_the_same_size(
    session: TrainingSession, tmp_path: Path
) -> None:
    """PiSSA of rank r has the matrices of LoRA of rank 2r, which mean something else."""
    session.call(create("pissa", r=4, lora_alpha=8, init_lora_weights="pissa"))
    session.call(create("plain", r=8, lora_alpha=16))
    for name, other in (("pissa", "plain"), ("plain", "pissa")):
        session.call(SaveRun(name, str(tmp_path / name)))
        assert session.failure(RestoreRun(other, str(tmp_path / name))).param == "folder"


@pytest.mark.parametrize("wrong", ["exp_avg", "masters", "seed", "steps"])
def test_a_state_that_does_not_fit_changes_nothing(session: TrainingSession, tmp_path: Path, wrong: str) -> None:
    session.call(create("run"))
    session.train("run", range(1))
    adapter = trained(session, "run")
    whole, before = RunCheckpoint.of(adapter), adapter.masters.clone()
    session.train("run", range(1, 2))
    after = adapter.masters.clone()
    state = {**whole._state, wrong: torch.zeros(3)} if wrong in ("exp_avg", "masters") else dict(whole._state)
    if wrong in ("seed", "steps"):
        del state[wrong]
    record = RunCheckpoint(whole._record, {**state, "steps": torch.tensor(1)})
    record._state = state
    record.write(tmp_path / "saved")
    assert session.failure(RestoreRun("run", str(tmp_path / "saved"))).kind == "bad_request"
    assert adapter.masters.equal(after)
    assert adapter.steps == 2
    assert not after.equal(before)


class RacedDisk(Disk):
    """A disk on which another process makes the folder at the last moment."""

    def move(self, source: Path, target: Path) -> None:
        target.mkdir()
        (target / "theirs").write_bytes(b"precious")
        super().move(source, target)


def test_another_s_folder_is_not_removed(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable):
        write_folder(tmp_path / "saved", {"a": b"1"}, RacedDisk())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert (tmp_path / "saved" / "theirs").read_bytes() == b"precious"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "link", Path("relative"), Path("/"), Path("/tmp/.."), Path("/tmp/a\0b")):
        with pytest.raises(BadRequest) as raised:
            write_folder(path, {"a": b"1"})
        assert raised.value.param == "folder"
    assert (tmp_path / "link").is_symlink()
