"""Reading untrusted adapter files: valid ones are read exactly, all others are refused with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft_folders import config, tensors, write

from lora_serve.adapters.checkpoint import MAX_HEADER, MAX_TENSORS, load_tensors, read
from lora_serve.errors import AdapterInvalid, TooLarge


def container(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_folder_is_read_exactly(tmp_path: Path) -> None:
    checkpoint = read(write(tmp_path), max_bytes=1 << 20)
    assert checkpoint.config == config()
    for name, tensor in tensors().items():
        torch.testing.assert_close(checkpoint.tensors[name], tensor, rtol=0, atol=0)
    assert checkpoint.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_tensors_of_mixed_dtypes_and_at_odd_places_are_read_as_the_library_reads_them() -> None:
    saved = {
        "a": torch.randn(3, 5).half(),
        "b": torch.randn(1),
        "c": torch.randn(2, 0),
        "d": torch.randn(()).bfloat16(),
        "e_topk_indices": torch.arange(6, dtype=torch.uint8).view(3, 2),
        "f.lora_A": torch.randn(7),
    }
    saved = {("x.lora_B" if name == "c" else name): tensor for name, tensor in saved.items()}
    blob, header, start = b"", {}, 0
    for name, tensor in saved.items():  # the library sorts by dtype; other writers may not
        data = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}[tensor.dtype]
        header[name] = entry(start, start + len(data), list(tensor.shape), dtype)
        blob, start = blob + data, start + len(data)
    for padding in range(8):
        text = json.dumps(header).encode() + b" " * padding
        file = container(text, blob)
        mine, library = load_tensors(bytearray(file)), safetensors.torch.load(file)
        assert mine.keys() == library.keys()
        for name, tensor in library.items():
            assert mine[name].dtype == tensor.dtype
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0)
            assert mine[name].data_ptr() % tensor.dtype.itemsize == 0


def test_doubles_become_floats_and_must_be_finite_as_such(tmp_path: Path) -> None:
    weights = {name: tensor.double() for name, tensor in tensors().items()}
    checkpoint = read(write(tmp_path, weights), max_bytes=1 << 20)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    first = next(iter(weights))
    weights[first][0, 0] = 1e300
    with pytest.raises(AdapterInvalid, match=f"not finite in {first}"):
        read(write(tmp_path, weights), max_bytes=1 << 20)


def test_tensors_do_not_change_when_the_file_changes_after_reading(tmp_path: Path) -> None:
    checkpoint = read(write(tmp_path), max_bytes=1 << 20)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    name = next(iter(tensors()))
    torch.testing.assert_close(checkpoint.tensors[name], tensors()[name], rtol=0, atol=0)


INVALID_FILES = {
    "no header": b"abc",
    "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "a huge header": (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
    "not JSON": container(b"{nope"),
    "not an object": container(b"[]"),
    "nested beyond reason": container(b"[" * 100_000),
    "the same tensor twice": container(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "truncated data": container({"a": entry(0, 8, [2])}, bytes(4)),
    "data after the tensors": container({"a": entry(0, 8, [2])}, bytes(9)),
    "overlapping tensors": container({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "a gap": container({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "a size that is not the shape's": container({"a": entry(0, 8, [3])}, bytes(8)),
    "a negative offset": container({"a": entry(-4, 0, [1])}, bytes(4)),
    "an empty tensor": container({"a": entry(0, 0, [0])}),
    "a negative dimension": container({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "202 dimensions": container({"a": entry(0, 4, [1] * 202)}, bytes(4)),
    "a dimension beyond all numbers": container({"a": entry(0, 4, [10**30])}, bytes(4)),
    "metadata that are not words": container({"__metadata__": {"a": 1}, "a": entry(0, 4, [1])}, bytes(4)),
    "no tensors of its own": container({"__metadata__": {"format": "pt"}}),
    "a tensor twice, once in escapes": container(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "a shape twice": container(b'{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a boolean dimension": container({"a": entry(0, 4, [True])}, bytes(4)),
    "integers": container({"a": entry(0, 8, [1], "I64")}, bytes(8)),
    "8-bit floats": container({"a": entry(0, 8, [8], "F8_E4M3")}, bytes(8)),
    "an entry that is no entry": container({"a": 5}),
    "200,000 tensors": container({f"t{i}": entry(0, 0, [0]) for i in range(MAX_TENSORS + 1)}),
}


@pytest.mark.parametrize("what", INVALID_FILES)
def test_an_invalid_safetensors_file_is_refused(what: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        load_tensors(bytearray(INVALID_FILES[what]))
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused_naming_the_key(value: float, tmp_path: Path) -> None:
    weights = tensors()
    name = [*weights][1]
    weights[name][3, 2] = value
    with pytest.raises(AdapterInvalid, match=name):
        read(write(tmp_path, weights), max_bytes=1 << 20)


def test_float64_is_read_as_float32_and_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    weights = {name: tensor.double() for name, tensor in tensors().items()}
    assert {tensor.dtype for tensor in read(write(tmp_path, weights), max_bytes=1 << 20).tensors.values()} == {
        torch.float32
    }
    name = [*weights][1]
    weights[name][3, 2] = 1e300
    with pytest.raises(AdapterInvalid, match=name):
        read(write(tmp_path, weights), max_bytes=1 << 20)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"r": NaN}', '{"r": 1, "r": 2}', "\xff", "{" * 5000],
    ids=["empty", "list", "nan", "twice", "bytes", "deep"],
)
def test_a_broken_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
        read(tmp_path, max_bytes=1 << 20)


def test_pickles_are_refused_by_name_with_advice(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin.*safe_serialization=True"):
        read(tmp_path, max_bytes=1 << 20)


def test_links_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "real")
    write(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    os.symlink(tmp_path / "real" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match="link"):
        read(tmp_path / "a", max_bytes=1 << 20)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json is missing"):
        read(tmp_path, max_bytes=1 << 20)
    (write(tmp_path) / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors is missing"):
        read(tmp_path, max_bytes=1 << 20)


def test_a_file_over_the_size_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        read(write(tmp_path), max_bytes=100)


@pytest.mark.parametrize("text", ['{"r": 1000000000000000000000000000000}', '{"a\\ud800b": 1}', '{"r": "\\udfff"}'])
def test_values_that_no_message_can_carry_are_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterInvalid):
        read(tmp_path, max_bytes=1 << 20)


def test_error_messages_contain_no_control_characters() -> None:
    assert AdapterInvalid("key \x1b]0;evil\x07 \u202e").message == "key \ufffd]0;evil\ufffd \ufffd"
