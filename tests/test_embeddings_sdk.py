"""Embeddings by the openai SDK, from a base and an adapter that sentence-transformers saved, against its own."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
from openai import OpenAI
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from server_process import DEMO, ServerProcess
from torch import Tensor

SENTENCE = "two red foxes run home seven old cats sleep under a green tree while one blue bird sings"
TEXTS = [" ".join(SENTENCE.split()[:count]) for count in (1, 3, 17, 6, 11, 2, 9, 14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that pools by mean, and adapters with their own pooling and with the base's."""
    folder = tmp_path_factory.mktemp("saved")
    as_it_comes = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}  # without chat template
    transformer = Transformer(
        str(DEMO),
        model_kwargs={"dtype": "float32"},
        modality_config=as_it_comes,
        module_output_name="token_embeddings",
    )
    transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    size = transformer.auto_model.config.hidden_size
    SentenceTransformer(modules=[transformer, Pooling(size, "mean")], device="cpu").save(str(folder / "base"))
    base = SentenceTransformer(str(folder / "base"), device="cpu")
    base.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="FEATURE_EXTRACTION"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    base.save(str(folder / "as-the-base"))
    SentenceTransformer(modules=[base[0], Pooling(size, "lasttoken"), Normalize()], device="cpu").save(
        str(folder / "own")
    )
    for name in ("modules.json", "1_Pooling/config.json"):
        (folder / "as-the-base" / name).unlink()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--served-model-name", "demo", "--max-num-batched-tokens", "32")
    with ServerProcess(tmp_path_factory.mktemp("store"), *options, model=folder / "base") as server:
        for name in ("own", "as-the-base"):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as archive:
                archive.add(folder / name, arcname=name)
            files = {"archive": ("a.tar.gz", packed.getvalue())}
            server.http.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Tensor]:
    """Embeddings [texts, hidden] by sentence-transformers, in one padded batch."""
    models = {"demo": SentenceTransformer(str(folder / "base"), device="cpu")}
    models["own"] = SentenceTransformer(str(folder / "own"), device="cpu")
    models["as-the-base"] = SentenceTransformer(modules=[models["own"][0], models["demo"][1]], device="cpu")
    return {name: model.encode(TEXTS, convert_to_tensor=True).float() for name, model in models.items()}


def vectors(answer: Any) -> Tensor:
    assert [item.index for item in answer.data] == [*range(len(answer.data))]
    return torch.tensor([item.embedding for item in answer.data])


@pytest.mark.parametrize("name", ["demo", "own", "as-the-base"])
def test_embeddings_equal_sentence_transformers(client: OpenAI, theirs: dict[str, Tensor], name: str) -> None:
    packed = client.embeddings.create(model=name, input=TEXTS)  # the SDK asks for base64 and decodes it
    torch.testing.assert_close(vectors(packed), theirs[name], atol=1e-5, rtol=1e-5)
    plain = client.embeddings.create(model="demo", input=TEXTS, encoding_format="float",
                                     extra_body={} if name == "demo" else {"adapter": name})  # fmt: skip
    torch.testing.assert_close(vectors(plain), theirs[name], atol=1e-5, rtol=1e-5)
    assert plain.model == name
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > len(TEXTS)


def test_embeddings_under_every_adapter_at_once_beside_generation(
    server: ServerProcess, client: OpenAI, theirs: dict[str, Tensor]
) -> None:
    alone = server.complete(TEXTS[2], max_tokens=100)

    def one(job: tuple[str, int]) -> Tensor:
        return vectors(client.embeddings.create(model=job[0], input=TEXTS[job[1]]))[0]

    jobs = [(name, index) for index in range(len(TEXTS)) for name in theirs]
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(server.complete, TEXTS[2], max_tokens=100) for _ in range(3)]
        found = [*pool.map(one, jobs)]
        assert [each.result() for each in running] == [alone] * 3
    for (name, index), vector in zip(jobs, found, strict=True):
        torch.testing.assert_close(vector, theirs[name][index], atol=1e-5, rtol=1e-5)


def test_dimensions_and_token_ids(server: ServerProcess, client: OpenAI, theirs: dict[str, Tensor]) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": TEXTS[2]}).json()["tokens"]
    few = vectors(client.embeddings.create(model="own", input=[tokens], dimensions=16))[0]
    want = theirs["own"][2, :16]
    torch.testing.assert_close(few, want / want.norm(), atol=1e-5, rtol=1e-5)


def test_two_thousand_inputs_in_one_call(client: OpenAI, theirs: dict[str, Tensor]) -> None:
    answer = vectors(client.embeddings.create(model="own", input=[TEXTS[0], TEXTS[1]] * 1024))
    torch.testing.assert_close(answer, theirs["own"][:2].repeat(1024, 1), atol=1e-5, rtol=1e-5)


def test_errors_are_the_sdk_s_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="x")
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model="own", input="home " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wide:
        client.embeddings.create(model="own", input="x", dimensions=10_000)
    assert wide.value.param == "dimensions"


def test_requests_are_counted_by_endpoint(server: ServerProcess, client: OpenAI) -> None:
    client.embeddings.create(model="own", input=["x", "y"])
    lines = server.http.get("/metrics").text.splitlines()
    assert any('lora_serve_requests_total{endpoint="embeddings",outcome="stop"}' in line for line in lines)


def test_a_base_and_an_adapter_that_are_not_made_for_embeddings_say_what_would_make_them_so(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "as-the-base" / "adapter_config.json").read_text())
    writer = tmp_path / "adapters" / "writer"
    writer.mkdir(parents=True)
    (writer / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    weights = (folder / "as-the-base" / "adapter_model.safetensors").read_bytes()
    (writer / "adapter_model.safetensors").write_bytes(weights)
    with ServerProcess(tmp_path / "store", "--adapters", str(tmp_path / "adapters")) as server:
        for body, param, needed in (
            ({}, "model", "modules.json and 1_Pooling/config.json"),
            ({"adapter": "writer"}, "adapter", "FEATURE_EXTRACTION"),
        ):
            answer = server.http.post("/v1/embeddings", json={"input": "x", **body})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert needed in answer.json()["error"]["message"]


def test_base64_holds_little_endian_float32(server: ServerProcess, theirs: dict[str, Tensor]) -> None:
    answer = server.http.post("/v1/embeddings", json={"input": TEXTS[0], "encoding_format": "base64"}).json()
    vector = torch.frombuffer(bytearray(base64.b64decode(answer["data"][0]["embedding"])), dtype=torch.float32)
    torch.testing.assert_close(vector, theirs["demo"][0], atol=1e-5, rtol=1e-5)
