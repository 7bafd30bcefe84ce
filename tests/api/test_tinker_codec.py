"""Protobuf of Tinker's API against the SDK's own classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tinker import types
from tinker.proto import tinker_public_pb2 as sdk
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from lora_serve.api.tinker.pass_codec import MOST_DATUMS, MOST_PARTS, decode_pass, encode_pass, read_pass_header
from lora_serve.api.tinker.protobuf_messages import FIELDS
from lora_serve.api.tinker.sample_codec import SampleOutput, encode_samples
from lora_serve.errors import BadRequest
from lora_serve.request import Logprob
from lora_serve.training_messages import PassResult, TrainingExample

MODEL = "m:train:0"


def sent(*data: types.Datum, loss: str = "cross_entropy", config: dict[str, float | str] | None = None) -> bytes:
    given = ForwardBackwardInput(data=list(data), loss_fn=loss, loss_fn_config=config)  # type: ignore[arg-type]
    request = ForwardBackwardRequest(forward_backward_input=given, model_id=MODEL, seq_id=7)
    return bytes(forward_backward_request_to_proto(request).SerializeToString())


def datum(*chunks: list[int], **inputs: object) -> types.Datum:
    prompt = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=each) for each in chunks])
    return types.Datum(model_input=prompt, loss_fn_inputs=inputs)  # type: ignore[arg-type]


def test_the_table_has_the_numbers_and_kinds_of_the_sdk() -> None:
    for name, fields in FIELDS.items():
        own = {(field.split()[1], int(field.split()[2])) for field in fields}
        theirs = {(field.name, field.number) for field in sdk.DESCRIPTOR.message_types_by_name[name].fields}
        assert own <= theirs, name


def test_a_request_of_several_chunks_and_losses() -> None:
    first = datum([1, 2], [3], target_tokens=[2, 3, 4], weights=[0.0, 0.5, -2.0])
    body = sent(first, datum([9], target_tokens=[8], weights=[1.0]))
    assert read_pass_header(body) == (MODEL, 7)
    operation = decode_pass(body, "run")
    assert operation.examples == [
        TrainingExample([1, 2, 3], [2, 3, 4], {"weights": [0.0, 0.5, -2.0]}),
        TrainingExample([9], [8], {"weights": [1.0]}),
    ]
    assert (operation.run, operation.loss, operation.forward_only, operation.all_logprobs) == (
        "run", "cross_entropy", False, True,
    )  # fmt: skip
    policy = datum([1], target_tokens=[2], logprobs=[-1.5], advantages=[2.0])
    operation = decode_pass(sent(policy, loss="ppo", config={"clip_low_threshold": 0.5}), "run")
    assert (operation.loss, operation.config) == ("ppo", {"clip_low_threshold": 0.5})
    assert operation.examples[0].inputs == {"logprobs": [-1.5], "advantages": [2.0]}


def test_weights_of_cross_entropy_are_1_where_there_are_none() -> None:
    assert decode_pass(sent(datum([1, 2], target_tokens=[2, 3])), "run").examples[0].inputs == {"weights": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("given", "config", "problem"),
    [
        (datum([1], target_tokens=torch.zeros(1, 64, dtype=torch.int64)), None, "not one-dimensional"),
        (
            datum([1], target_tokens=types.TensorData.from_numpy(np.zeros((1, 3), np.int64))),
            None,
            "not one-dimensional",
        ),
        (datum([1, 2], target_tokens=[2]), None, "2 tokens and 1 targets"),
        (datum([1], target_tokens=[2], weights=[1.0, 2.0]), None, "1 tokens and 2 weights"),
        (datum([1], weights=[1.0]), None, "no target_tokens"),
        (datum([1], target_tokens=[2]), {"kl": "text"}, "kl is text"),
        (
            types.Datum(
                model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)]),
                loss_fn_inputs={"target_tokens": [2]},  # type: ignore[dict-item]
            ),
            None,
            "image or audio",
        ),
    ],
)
def test_what_is_not_trained_on_is_named(given: types.Datum, config: dict[str, float | str], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        decode_pass(sent(given, config=config), "run")


@pytest.mark.parametrize(
    "body",
    [
        b"\x0a\xff",  # cut off
        b"\x0f",  # no wire type
        b"\x10" + b"\xff" * 12,  # an endless number
        b"\x0a\x02\xff\xff",  # no text
        b"\x1a\x00" * (MOST_DATUMS + 1),
        b"\x1a" + b"\xa0\x8d\x18" + b"\x0a\x00" * (MOST_PARTS + 100_000),  # one datum of many chunks
    ],
)
def test_hostile_requests_are_refused_before_they_are_decoded(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read_pass_header(body)


def test_a_request_that_only_looks_like_one_is_refused() -> None:
    with pytest.raises(BadRequest, match="no ForwardBackwardRequest"):
        decode_pass(b"\x1a\x02\x0a\x7f", "run")
    with pytest.raises(BadRequest, match="no datum"):
        decode_pass(b"", "run")
    bad = sdk.ForwardBackwardRequest()
    bad.data.add().model_input.add().encoded_text.tokens = b"abc"
    with pytest.raises(BadRequest, match="incomplete number"):
        decode_pass(bad.SerializeToString(), "run")


def test_a_result_as_the_sdk_reads_it() -> None:
    result = PassResult(1.25, [[-0.5, -1.0], [-2.0]], {"clip": 0.5, "entropy:sum": 2.0}, 3)
    read = deserialize_forward_backward_output(encode_pass(result))
    assert [each["logprobs"].tolist() for each in read.loss_fn_outputs] == [[-0.5, -1.0], [-2.0]]
    assert read.metrics == {"loss:sum": 1.25, "tokens:sum": 3.0, "clip:mean": 0.5, "entropy:sum": 2.0}


def test_samples_as_the_sdk_reads_them() -> None:
    tokens = [Logprob(5, -0.5, [(5, -0.5), (6, -1.0)]), Logprob(7, -2.0, [(8, -0.1)])]
    prompt = [None, Logprob(2, -1.0), Logprob(3, -1.5)]
    data = encode_samples(
        [SampleOutput([5, 7], tokens, True), SampleOutput([5], tokens[:1], False)],
        top=2, prompt=prompt, last=1, cached=2,
    )  # fmt: skip
    read = deserialize_sample_response(data)
    assert [(list(each.tokens), each.stop_reason) for each in read.sequences] == [([5, 7], "stop"), ([5], "length")]
    assert read.sequences[0].logprobs == [-0.5, -2.0]
    top = sdk.SampleResponse.FromString(data).sequences[0].topk_sampled_logprobs
    assert (top.k, top.length) == (2, 2)
    assert np.frombuffer(top.token_ids, np.int32).tolist() == [5, 6, 8, 0]
    assert np.frombuffer(top.logprobs, np.float32)[3] == -99999
    assert read.prompt_logprobs == [None, None, -1.5]
    assert math.isnan(np.frombuffer(sdk.SampleResponse.FromString(data).prompt_logprobs, np.float32)[0])
