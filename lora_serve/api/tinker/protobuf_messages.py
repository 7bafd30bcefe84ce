"""Protobuf messages of Tinker's API, as classes made from a table of their fields.

The client's messages are proto3, package `tinker_public`. These are proto2 in a pool of their own, which is the same on
the wire and tells fields that are absent; enumerations are their numbers. Fields that are not listed are not read.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "lora_serve.tinker"
STOP, LENGTH = 0, 1  # StopReason
FLOAT32, INT64, INT32 = 1, 2, 3  # DType

# "type name number"; a type with * is repeated, with % a map from strings.
FIELDS = {
    "ForwardBackwardRequest": (
        "string model_id 1",
        "int32 seq_id 2",
        "Datum* data 3",
        "string loss_fn 4",
        "double% loss_fn_config 5",
        "bool forward_only 6",
        "LossConfigValue% loss_fn_config_v2 7",
    ),
    "LossConfigValue": ("double number 1", "string text 2"),
    "Datum": ("Chunk* model_input 1", "Tensor% loss_fn_inputs 2"),
    "Chunk": ("EncodedTextChunk encoded_text 1", "ImageChunk image 2", "DmelChunk dmel 3"),
    "EncodedTextChunk": ("bytes tokens 1",),
    "ImageChunk": (),
    "DmelChunk": (),
    "Tensor": ("bytes dense 1", "SparseCsr sparse_csr 2", "int32 dtype 3", "int64* shape 4"),
    "SparseCsr": ("bytes values 1", "bytes crow_indices 2", "bytes col_indices 3"),
    "ForwardBackwardOutput": (
        "string loss_fn_output_type 1",
        "ArrayRecord* loss_fn_outputs 2",
        "double% metrics 3",
    ),
    "ArrayRecord": ("string type_tag 1", "BatchedTensor% fields 2", "int64 num_datums 3"),
    "BatchedTensor": ("bytes data 1", "bytes offsets 2", "int32 dtype 3", "int64* trailing_shape 4"),
    "SampleResponse": (
        "SampledSequence* sequences 1",
        "bytes prompt_logprobs 2",
        "TopkLogprobs topk_prompt_logprobs 3",
        "int32 prompt_cache_hit_tokens 4",
    ),
    "SampledSequence": (
        "int32 stop_reason 1",
        "bytes tokens 2",
        "bytes logprobs 3",
        "TopkLogprobs topk_sampled_logprobs 4",
    ),
    "TopkLogprobs": ("bytes token_ids 1", "bytes logprobs 2", "uint32 k 3", "uint32 length 4"),
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "double": _Field.TYPE_DOUBLE,
    "int64": _Field.TYPE_INT64,
    "int32": _Field.TYPE_INT32,
    "uint32": _Field.TYPE_UINT32,
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}


def _add_field(message: Any, kind: str, name: str, number: int) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.endswith("*"):
        field.label = _Field.LABEL_REPEATED
    if kind.endswith("%"):
        field.label = _Field.LABEL_REPEATED
        entry_name = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        entry = message.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        _add_field(entry, "string", "key", 1)
        _add_field(entry, kind[:-1], "value", 2)
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{message.name}.{entry_name}"
        return
    kind = kind.rstrip("*")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


def _make_messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="lora_serve/tinker.proto", package=PACKAGE, syntax="proto2")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field in fields:
            kind, field_name, number = field.split()
            _add_field(message, kind, field_name, int(number))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in FIELDS}


_MESSAGES = _make_messages()
ForwardBackwardRequest: Any = _MESSAGES["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = _MESSAGES["ForwardBackwardOutput"]
SampleResponse: Any = _MESSAGES["SampleResponse"]
TopkLogprobs: Any = _MESSAGES["TopkLogprobs"]
