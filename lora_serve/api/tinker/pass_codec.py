"""Protobuf bodies of `forward_backward`, decoded with bounded work, and its results, encoded."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from lora_serve.api.tinker.protobuf_messages import (
    FLOAT32,
    INT32,
    INT64,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
)
from lora_serve.errors import BadRequest
from lora_serve.training_messages import ForwardBackward, PassResult, TrainingExample

MOST_DATUMS = 4096  # of one request; clients send at most 1024
MOST_PARTS = 100_000  # chunks, tensors and shapes of all datums together
TARGETS, WEIGHTS, CROSS_ENTROPY = "target_tokens", "weights", "cross_entropy"
ELEMENTS = {FLOAT32: "f", INT64: "q", INT32: "i"}  # little-endian, as are the machines that this runs on
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class PassHeader(NamedTuple):
    """Which call of which model a request is."""

    model_id: str
    seq_id: int


def read_pass_header(body: bytes) -> PassHeader:
    """Find model and call in a request without decoding its data, and count what that has. Raises `BadRequest`."""
    view = memoryview(body)
    model_id, seq_id, datums, parts = b"", 0, 0, 0
    for number, wire, value in _fields(view):
        if number == 1 and wire == BYTES:
            model_id = bytes(view[value[0] : value[1]])
        elif number == 2 and wire == VARINT:
            seq_id = value[0]
        elif number == 3 and wire == BYTES:
            datums += 1
            for _ in _fields(view[value[0] : value[1]]):
                parts += 1
                if parts > MOST_PARTS:
                    break
        if datums > MOST_DATUMS or parts > MOST_PARTS:
            raise BadRequest(f"more than {MOST_DATUMS:,} datums, or {MOST_PARTS:,} parts of them, in a request")
    try:
        return PassHeader(model_id.decode(), seq_id)
    except UnicodeDecodeError:
        raise BadRequest("model_id is no text", param="model_id") from None


def decode_pass(body: bytes, run: str) -> ForwardBackward:
    """The operation that a checked request asks for. Raises `BadRequest` naming what is not served."""
    try:
        request = ForwardBackwardRequest.FromString(body)
    except (DecodeError, UnicodeDecodeError):
        raise BadRequest("the body is no ForwardBackwardRequest") from None
    config = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.HasField("text"):
            raise BadRequest(f"loss_fn_config: {name[:100]} is text, and a number is needed", param="loss_fn_config")
        config[name] = value.number
    examples = [_example(datum, f"data[{place}]") for place, datum in enumerate(request.data)]
    if not examples:
        raise BadRequest("there is no datum to train on", param="data")
    if request.loss_fn == CROSS_ENTROPY:
        for example in examples:
            example.inputs.setdefault(WEIGHTS, [1.0] * len(example.targets))
    return ForwardBackward(run, examples, request.loss_fn, config, request.forward_only, all_logprobs=True)


def encode_pass(result: PassResult) -> bytes:
    """The response to a pass: the targets' log-probabilities, and the loss among the metrics."""
    output = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(result.logprobs))
    field = record.fields["logprobs"]
    field.data = b"".join(array("f", each).tobytes() for each in result.logprobs)
    field.offsets = array("q", accumulate((4 * len(each) for each in result.logprobs), initial=0)).tobytes()
    field.dtype = FLOAT32
    output.metrics["loss:sum"] = result.loss
    output.metrics["tokens:sum"] = float(result.tokens)
    for name, value in result.metrics.items():
        output.metrics[name if name.count(":") == 1 else f"{name.replace(':', '_')}:mean"] = value
    encoded: bytes = output.SerializeToString()
    return encoded


def _example(datum: Any, where: str) -> TrainingExample:
    tokens: list[int] = []
    for chunk in datum.model_input:
        if not chunk.HasField("encoded_text"):
            raise BadRequest(f"{where} has an image or audio; text alone is trained on", param="data")
        tokens += _numbers(chunk.encoded_text.tokens, "i", where, "model_input")
    inputs = {name: _tensor(tensor, where, name[:100]) for name, tensor in datum.loss_fn_inputs.items()}
    targets = inputs.pop(TARGETS, None)
    if targets is None:
        raise BadRequest(f"{where} has no {TARGETS}", param="data")
    if len(targets) != len(tokens):
        raise BadRequest(f"{where} has {len(tokens)} tokens and {len(targets)} targets", param="data")
    for name, values in inputs.items():
        if len(values) != len(tokens):
            raise BadRequest(f"{where} has {len(tokens)} tokens and {len(values)} {name[:100]}", param="data")
    whole = [int(target) for target in targets]
    return TrainingExample(tokens, whole, {name: [float(value) for value in each] for name, each in inputs.items()})


def _tensor(tensor: Any, where: str, name: str) -> list[Any]:
    """The numbers of a one-dimensional tensor."""
    several = len(tensor.shape) > 2 or (len(tensor.shape) == 2 and tensor.shape[1] != 1)
    if several or tensor.HasField("sparse_csr"):
        raise BadRequest(f"{where}: {name} is not one-dimensional: one target a position is trained on", param="data")
    if tensor.dtype not in ELEMENTS:
        raise BadRequest(f"{where}: {name} has a dtype that is not float32, int64 or int32", param="data")
    return _numbers(tensor.dense, ELEMENTS[tensor.dtype], where, name)


def _numbers(data: bytes, kind: str, where: str, name: str) -> list[Any]:
    numbers = array(kind)
    if len(data) % numbers.itemsize:
        raise BadRequest(f"{where}: {name} has an incomplete number", param="data")
    numbers.frombytes(data)
    return numbers.tolist()


def _fields(view: memoryview) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Number, wire type and value of each field: a number, or where its bytes begin and end. Raises `BadRequest`."""
    place, end = 0, len(view)
    while place < end:
        tag, place = _varint(view, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _varint(view, place)
            yield number, wire, (value, 0)
            continue
        if wire == BYTES:
            size, place = _varint(view, place)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise BadRequest("the body is no protobuf message")
        if size > end - place:
            raise BadRequest("the protobuf message is cut off")
        yield number, wire, (place, place + size)
        place += size


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(view) and shift < 70:
        byte = view[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise BadRequest("the protobuf message is cut off")
