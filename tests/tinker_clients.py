"""Programs that use Tinker's own SDK, unmodified, each in a process of its own: `python tinker_clients.py NAME URL`.

The SDK keeps a thread and connections until its process ends.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

DEMO = Path(__file__).parent.parent / "demo" / "model"
WORDS = "three happy wolves sing tonight\n"


def demo_tokenizer() -> Any:
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(str(DEMO))


def datum(prompt: list[int], answer: list[int]) -> types.Datum:
    """A prompt, and an answer that is trained."""
    tokens, weights = prompt + answer, [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},  # type: ignore[dict-item]
    )


def stub(url: str) -> None:
    """All kinds of calls, on the stub engine of `api/stub_training.py`."""
    service = tinker.ServiceClient(base_url=url)
    client = service.create_lora_training_client(base_model="Qwen/Qwen3-8B-Base:base", rank=4).result()
    assert client.get_info().model_data.model_name == "Qwen/Qwen3-8B-Base:base"
    example = datum([1, 2], [3])
    pending = []
    for _ in range(3):
        passed = client.forward_backward([example], "cross_entropy")
        pending.append((passed, client.optim_step(types.AdamParams(learning_rate=1.0))))
    losses = []
    for passed, stepped in pending:
        losses.append(passed.result().metrics["loss:sum"])
        assert stepped.result().metrics == {"grad_norm:mean": 1.0, "learning_rate:mean": 1.0}
    assert losses == [0.0, 1.0, 2.0]
    with pytest.raises(tinker.RequestFailedError, match="'nonsense' is no loss function"):
        client.forward_backward([example], "nonsense").result()  # type: ignore[arg-type]
    path = client.save_state("one").result().path
    loaded = service.create_training_client_from_state_with_optimizer(path).result()
    assert loaded.forward([example], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist() == [-3.0, -3.0]
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([104, 105])
    answer = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=3, stop="ell")).result()
    assert [list(each.tokens) for each in answer.sequences] == [list(b"hel"), list(b"hel")]
    assert len(answer.sequences[0].logprobs or []) == 3
    found = service.create_sampling_client(base_model="base").result().compute_logprobs(prompt).result()
    assert found == [None, pytest.approx(-10.5)]
    rest = tinker.RestClient(base_url=url)
    assert [each.tinker_path for each in rest.list_user_checkpoints().result().checkpoints] == [path]
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_user_checkpoints().result().checkpoints == []


def supervised(url: str) -> None:
    """Learn another answer than the demo model's."""
    tokenizer = demo_tokenizer()
    prompt, answer = tokenizer.encode(WORDS), tokenizer.encode("the wolves are gone")
    end = tokenizer.eos_token_id
    service = tinker.ServiceClient(base_url=url)
    client = service.create_lora_training_client(base_model="Qwen/Qwen3-8B-Base:demo", rank=8, seed=1).result()
    greedy = types.SamplingParams(max_tokens=16, temperature=0.0)

    def said() -> list[int]:
        sampler = client.save_weights_and_get_sampling_client().result()
        return list(sampler.sample(types.ModelInput.from_ints(prompt), 1, greedy).result().sequences[0].tokens)

    before, losses = said(), []
    for _ in range(40):
        passed = client.forward_backward([datum(prompt, [*answer, end])], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=4e-3)).result()
        losses.append(passed.result().metrics["loss:sum"])
    assert losses[-1] < losses[0] / 10, losses
    assert said() != before
    named = client.save_weights_for_sampler("final").result().path
    sampler = service.create_sampling_client(model_path=named).result()
    assert list(sampler.sample(types.ModelInput.from_ints(prompt), 1, greedy).result().sequences[0].tokens) == said()


def reinforced(url: str) -> None:
    """Learn by rewards alone to prefer tokens with even numbers, from samples of the newest weights each step."""
    prompt = demo_tokenizer().encode(WORDS)
    service = tinker.ServiceClient(base_url=url)
    client = service.create_lora_training_client(base_model="demo", rank=8, seed=2).result()
    params = types.SamplingParams(max_tokens=1, temperature=6.0)  # the demo model is sure of what comes next
    masked = [0.0] * (len(prompt) - 1)
    preferences: list[float] = []
    first: list[types.Datum] = []
    for _ in range(6):
        sampler = client.save_weights_and_get_sampling_client().result()
        data = []
        for each in sampler.sample(types.ModelInput.from_ints(prompt), 32, params).result().sequences:
            (token,), (logprob,) = each.tokens, each.logprobs or []
            inputs = {
                "target_tokens": [0] * (len(prompt) - 1) + [token],
                "logprobs": [*masked, logprob],
                "advantages": [*masked, 1.0 if token % 2 == 0 else -1.0],
            }
            data.append(
                types.Datum(model_input=types.ModelInput.from_ints(prompt), loss_fn_inputs=inputs)  # type: ignore[arg-type]
            )
        first = first or data
        found = client.forward(first, "importance_sampling").result().loss_fn_outputs
        pairs = zip(found, first, strict=True)
        preferences.append(
            sum(out["logprobs"].tolist()[-1] * each.loss_fn_inputs["advantages"].tolist()[-1] for out, each in pairs)
        )
        client.forward_backward(data, "importance_sampling").result()
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    print(preferences)
    assert preferences[-1] > preferences[0] + 1, preferences


def steady(url: str) -> None:
    """Train, slowly enough to be disturbed; prints each loss."""
    tokenizer = demo_tokenizer()
    example = datum(tokenizer.encode(WORDS), tokenizer.encode("the wolves are gone"))
    service = tinker.ServiceClient(base_url=url)
    client = service.create_lora_training_client(base_model="demo", rank=4, seed=3).result()
    for step in range(12):
        passed = client.forward_backward([example], "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
        if step == 4:
            client.save_state("four").result()
        print(passed.result().metrics["loss:sum"], flush=True)
        stepped.result()
        time.sleep(0.4)


if __name__ == "__main__":
    {each.__name__: each for each in (stub, supervised, reinforced, steady)}[sys.argv[1]](sys.argv[2])
