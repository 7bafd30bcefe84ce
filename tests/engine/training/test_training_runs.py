"""Training runs through the engine's messages, on a real base: what is answered, saved, restored and refused."""

from __future__ import annotations

import copy
import errno
from pathlib import Path

import pytest
import torch
from failing_disk import FailingDisk
from peft import PeftModel
from support import reference
from training_session import TrainingSession, batch, create

from lora_serve.adapters.tensor_folder import write_folder
from lora_serve.config import ServeConfig
from lora_serve.errors import Failure, StorageFull
from lora_serve.messages import Drain
from lora_serve.training_messages import (
    CloseRun,
    ExportRun,
    ForwardBackward,
    OptimizerStep,
    RestoreRun,
    SaveRun,
    TrainingExample,
)


def test_what_was_saved_continues_bit_for_bit_in_another_engine(session: TrainingSession, tmp_path: Path) -> None:
    info = session.call(create("run"))
    assert info["parameters"] > 0
    losses = session.train("run", range(3))
    session.call(SaveRun("run", str(tmp_path / "saved")))
    wanted = session.train("run", range(3, 6))
    assert wanted[-1] != losses[-1]
    other = TrainingSession(tmp_path / "other")
    other.call(create("again", seed=7))
    assert other.call(RestoreRun("again", str(tmp_path / "saved")))["steps"] == 3
    assert other.train("again", range(3, 6)) == wanted
    assert other.call(RestoreRun("again", str(tmp_path / "saved"), optimizer=False))["steps"] == 0
    found = other.train("again", range(3, 6))
    assert found[0] == wanted[0]
    assert found[2] != wanted[2]
    other.engine.close()


def test_what_was_exported_gives_the_same_log_probabilities_in_peft(session: TrainingSession, tmp_path: Path) -> None:
    session.call(create("run"))
    session.train("run", range(3), rate=0.05)
    session.call(ExportRun("run", str(tmp_path / "peft")))
    (example,) = batch(1, seed=9)
    found = session.call(ForwardBackward("run", [example], forward_only=True))
    model = PeftModel.from_pretrained(copy.deepcopy(reference("llama")), tmp_path / "peft").eval()
    logits = model(input_ids=torch.tensor([example.tokens])).logits[0].float()
    wanted = torch.log_softmax(logits, 1).gather(1, torch.tensor(example.targets)[:, None])[:, 0].detach()
    weights = torch.tensor(example.inputs["weights"])
    torch.testing.assert_close(torch.tensor(found["logprobs"][0]), wanted * (weights != 0), atol=1e-4, rtol=1e-4)
    assert found["loss"] == pytest.approx(-float((wanted * weights).sum()), rel=1e-4)
    assert found["tokens"] == len(example.tokens)


def test_requests_are_served_beside_a_run_and_get_the_same_tokens(session: TrainingSession) -> None:
    alone = session.ask("before", [5, 6, 7])
    session.call(create("run"))
    calls = [session.submit(ForwardBackward("run", batch(4, seed=seed))) for seed in range(3)]
    assert session.ask("during", [5, 6, 7]) == alone
    assert all(not isinstance(session.answer(call), Failure) for call in calls)


def test_batches_of_several_runs_share_passes_and_each_gets_what_it_gets_alone(session: TrainingSession) -> None:
    names = ("one", "two", "three")
    for name in (*names, "alone"):
        session.call(create(name))
    before = session.quanta
    wanted = [session.call(ForwardBackward("alone", batch(2, seed=seed), forward_only=True)) for seed in range(3)]
    alone = session.quanta - before
    calls = [
        session.submit(ForwardBackward(name, batch(2, seed=seed), forward_only=True)) for seed, name in enumerate(names)
    ]
    found = [session.answer(call) for call in calls]
    assert session.quanta - before == alone + alone // 3
    for own, other in zip(found, wanted, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert [len(each) for each in own["logprobs"]] == [len(each) for each in other["logprobs"]]


def test_a_batch_that_memory_does_not_hold_is_split_between_sequences(tmp_path: Path) -> None:
    whole, small = TrainingSession(tmp_path / "whole"), TrainingSession(tmp_path / "small", training_memory=14_600_000)
    for session in (whole, small):
        session.call(create("run"))
    examples = batch(40, length=24, weight=0.01)
    found = [session.call(ForwardBackward("run", examples)) for session in (whole, small)]
    assert small.quanta > 2 * whole.quanta
    assert found[1]["tokens"] == found[0]["tokens"] == 40 * 24
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    assert len(found[1]["logprobs"]) == 40
    norms = [session.call(OptimizerStep("run", 1e-3))["grad_norm"] for session in (whole, small)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    failure = small.failure(ForwardBackward("run", batch(1, length=120)))
    assert "MiB of --training-memory are free: make the sequences shorter" in failure.message
    whole.engine.close()
    small.engine.close()


def test_a_run_that_diverges_leaves_others_alone(session: TrainingSession) -> None:
    for name in ("sick", "healthy", "alone"):
        session.call(create(name))
    wanted = session.train("alone", range(3))
    session.call(ForwardBackward("sick", batch(2, weight=1e38)))
    losses = []
    for step in range(3):
        calls = [
            session.submit(ForwardBackward("sick", batch(2, seed=step, weight=1e38))),
            session.submit(ForwardBackward("healthy", batch(2, seed=step))),
        ]
        assert session.answer(calls[0])["loss"] > 1e37
        losses.append(session.answer(calls[1])["loss"])
        failure = session.failure(OptimizerStep("sick", 1.0, max_grad_norm=0.0))
        assert "the gradient of 'sick' is not finite" in failure.message
        session.call(OptimizerStep("healthy", 5e-3))
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_what_cannot_be_done_is_refused_with_the_reason(session: TrainingSession, tmp_path: Path) -> None:
    first, refused = batch(1)[0], {}
    session.call(create("run"))
    for name, operation in {
        "exists": create("run"),
        "unknown": OptimizerStep("nobody", 1e-3),
        "rank": create("large", r=4000),
        "modules": create("wrong", target_modules=["nothing"]),
        "memory": create("huge", r=1024),
        "loss": ForwardBackward("run", [first], loss="guess"),
        "weights": ForwardBackward("run", [TrainingExample(first.tokens, first.targets, {})]),
        "token": ForwardBackward("run", [TrainingExample([1 << 30], [1], {"weights": [1.0]})]),
        "nothing": ForwardBackward("run", []),
        "missing": RestoreRun("run", str(tmp_path / "nowhere")),
        "exists already": SaveRun("run", str(tmp_path)),
        "betas": OptimizerStep("run", 1e-3, betas=(2.0, 0.9)),
    }.items():
        refused[name] = session.failure(operation)
    kinds = {name: failure.kind for name, failure in refused.items()}
    assert kinds.pop("exists") == "run_exists"
    assert kinds.pop("unknown") == "run_not_found"
    assert set(kinds.values()) == {"bad_request"}
    assert {name: failure.param for name, failure in refused.items()} == {
        "exists": "run", "unknown": "run", "rank": "r", "modules": "target_modules", "memory": "r", "loss": "loss",
        "weights": "examples.0.inputs.weights", "token": "examples.0.tokens", "nothing": "examples",
        "missing": "folder", "exists already": "folder", "betas": "betas",
    }  # fmt: skip
    assert "takes" in refused["memory"].message
    assert session.call(CloseRun("huge")) is None


def test_a_saved_run_that_does_not_fit_or_is_damaged_is_refused(session: TrainingSession, tmp_path: Path) -> None:
    session.call(create("run"))
    session.call(create("other", lora_alpha=4))
    session.call(SaveRun("run", str(tmp_path / "saved")))
    failure = session.failure(RestoreRun("other", str(tmp_path / "saved")))
    assert failure.message == "the saved run has other modules, ranks or scalings than this one"
    state = tmp_path / "saved" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-4])
    assert "is damaged" in session.failure(RestoreRun("run", str(tmp_path / "saved"))).message


def test_closing_ends_what_is_not_finished_and_frees_the_memory(session: TrainingSession, tmp_path: Path) -> None:
    for name in ("going", "staying"):
        session.call(create(name))
    used = session.engine.stats().training_bytes
    calls = [session.submit(ForwardBackward(name, batch(2))) for name in ("going", "staying")]
    calls += [session.submit(SaveRun("going", str(tmp_path / "saved")))]
    session.step()
    session.step()
    assert session.call(CloseRun("going")) is None
    assert session.answer(calls[0]).kind == session.answer(calls[2]).kind == "run_not_found"
    assert session.answer(calls[1])["tokens"] == 24
    assert session.engine.stats().training_bytes == used // 2
    session.call(create("going"))
    for name in ("going", "staying"):
        session.call(CloseRun(name))
    assert session.engine.stats().training_bytes == 0


def test_training_is_refused_where_it_is_off(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path, training_memory=0)
    assert session.engine.info.training_memory == 0
    assert session.failure(create("run")).message.startswith("training is off")
    session.engine.close()


def test_a_base_that_devices_share_is_not_trained() -> None:
    with pytest.raises(ValueError, match="several devices share cannot be trained; leave --tensor-parallel away"):
        ServeConfig(model="m", tensor_parallel=2, training_memory=1 << 30)  # type: ignore[arg-type]


def test_examples_that_a_loss_compares_stay_in_one_pass(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path, training_memory=14_600_000)
    session.call(create("run"))
    pairs = [
        TrainingExample(each.tokens, each.targets, {"weights": [1.0] * 24, "logprobs": [-4.0] * 24})
        for each in batch(40, length=24)
    ]
    found = session.call(ForwardBackward("run", pairs, loss="dpo"))
    ones = [session.call(ForwardBackward("run", pairs[i : i + 2], loss="dpo")) for i in range(0, 40, 2)]
    assert found["loss"] == pytest.approx(sum(each["loss"] for each in ones), rel=1e-4)
    margins = [each["metrics"]["rewards_margin"] for each in ones]
    assert found["metrics"]["rewards_margin"] == pytest.approx(sum(margins) / 20, rel=1e-3)
    session.engine.close()


def test_while_the_server_drains_no_run_begins_and_those_that_there_are_can_be_saved(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path)
    session.call(create("run"))
    session.call(Drain())
    assert session.failure(create("other")).kind == "unavailable"
    session.call(SaveRun("run", str(tmp_path / "saved")))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"run.json", "state.safetensors"}
    session.engine.close()


def test_gradients_of_a_batch_that_failed_half_way_are_not_applied(session: TrainingSession) -> None:
    for name in ("run", "alone"):
        session.call(create(name))
    wanted = session.train("alone", range(1))
    runs = session.engine._training
    assert runs is not None
    call = session.submit(ForwardBackward("run", batch(2, seed=9)))
    while runs._pass is None or runs._pass.next.kind != "backward":
        session.step()

    def out_of_memory(_: object) -> None:
        raise torch.OutOfMemoryError

    session.step()
    runs._pass._pass._run = map(out_of_memory, [0])  # type: ignore[assignment]
    assert session.answer(call).message == "training ran out of memory; send smaller batches"
    assert "gradients were lost" in session.failure(OptimizerStep("run", 5e-3)).message
    assert session.train("run", range(1)) == wanted


def test_gradients_are_lost_in_a_step_that_ran_out_of_memory(session: TrainingSession) -> None:
    """Scaled, clipped or taken through an encoder a second time they would be others."""
    session.call(create("run"))
    session.call(ForwardBackward("run", batch(2)))
    assert session.engine._training is not None

    def out_of_memory(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError

    hook = session.engine._training._runs["run"].trained._optimizer.register_step_pre_hook(out_of_memory)
    assert session.failure(OptimizerStep("run", 5e-3)).message == "training ran out of memory"
    assert "gradients were lost" in session.failure(OptimizerStep("run", 5e-3)).message
    assert session.call(OptimizerStep("run", 5e-3))["grad_norm"] == 0


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_leaves_no_folder(at: int, tmp_path: Path) -> None:
    def full() -> OSError:
        return OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(StorageFull, match="the disk for training runs is full"):
        write_folder(tmp_path / "saved", {"a": b"12345", "b": b"123"}, FailingDisk(at, full, full=at > 0))
    assert list(tmp_path.iterdir()) == []


def test_training_has_its_part_of_the_memory_as_long_as_there_are_runs(tmp_path: Path) -> None:
    session = TrainingSession(tmp_path)
    residency = session.engine._registry.memory._residency
    assert residency.budget.training == 1 << 25
    for name in ("first", "second"):
        session.call(create(name))
    for name in ("first", "second"):
        assert residency.training
        session.call(CloseRun(name))
    assert not residency.training
    huge = session.failure(create("huge", r=1024, target_modules="all-linear"))  # refused in its own quantum
    assert "all training has 32.0 MiB" in huge.message
    assert not residency.training
    session.engine.close()
