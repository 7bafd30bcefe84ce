"""Write a model with random weights and PEFT LoRA adapters for it, in Hugging Face's and PEFT's file formats.

    python -m bench.make_model --shape qwen2.5-0.5b --adapters 32 --rank 16

writes `.bench/qwen2.5-0.5b/model` and `.bench/qwen2.5-0.5b/adapters/a0000 …`. Speed depends on the sizes of weights,
not on their values, so nothing is downloaded. Everything follows from the seed; what an earlier run with the same
arguments wrote is kept. The tokenizer is a byte-level BPE that needs no training: every id decodes to text, every text
encodes, and English takes a token per three or four letters, about as with real vocabularies.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bench.shapes import SHAPES, Shape

SHARD = 4 << 30  # bytes
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACE = "Ġ"  # how byte-level BPE writes a space
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(shape: Shape, folder: Path, *, seed: int = 0) -> None:
    """Write a model folder: bf16 safetensors, config and tokenizer."""
    with _atomic_folder(folder) as staging:
        generator = _generator(seed)
        shards = list(_shards(shape))
        index: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            index |= dict.fromkeys(names, file)
            weights = {name: _weight(name, size, generator) for name, size in names.items()}
            save_file(weights, staging / file, {"format": "pt"})
        if len(shards) > 1:
            _write_json(staging / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        eos = shape.vocabulary - 1
        _write_json(staging / "config.json", shape.config(eos))
        _write_json(staging / "generation_config.json", {"eos_token_id": eos})
        make_tokenizer(shape.vocabulary).save_pretrained(staging)


def make_adapter(shape: Shape, folder: Path, *, rank: int, seed: int, targets: Sequence[str] | None = None) -> None:
    """Write a PEFT LoRA folder: random non-zero A and B on `targets` (module names; None: all linear modules)."""
    write_adapter(folder, adapter_weights(shape, rank=rank, seed=seed, targets=targets))


def adapter_weights(shape: Shape, *, rank: int, seed: int, targets: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Random non-zero A and B on `targets` (module names; None: all linear modules), bf16, by PEFT's names."""
    sites = {name: size for name, size in shape.linears().items() if targets is None or _leaf(name) in targets}
    if targets is not None and {_leaf(name) for name in sites} != set(targets):
        raise ValueError(f"targets are among {', '.join(map(_leaf, shape.linears()))}")
    generator = _generator(seed)
    weights = {}
    for layer in range(shape.layers):
        for name, (inputs, outputs) in sites.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = _normal((rank, inputs), 1 / math.sqrt(inputs), generator)
            weights[f"{prefix}.lora_B.weight"] = _normal((outputs, rank), 0.02, generator)
    return weights


def write_adapter(folder: Path, weights: dict[str, Tensor], *, init_lora_weights: str | bool = True) -> None:
    """Write a PEFT LoRA folder with these weights, all of one rank, and this field of its configuration."""
    (rank,) = {tensor.shape[0] for name, tensor in weights.items() if name.endswith(".lora_A.weight")}
    targets = dict.fromkeys(_leaf(name.removesuffix(".lora_A.weight")) for name in weights if ".lora_A." in name)
    with _atomic_folder(folder) as staging:
        save_file(weights, staging / "adapter_model.safetensors", {"format": "pt"})
        config = _adapter_config(rank, list(targets)) | {"init_lora_weights": init_lora_weights}
        _write_json(staging / "adapter_config.json", config)


def make_tokenizer(size: int) -> Any:
    """A tokenizer with exactly `size` ids: 256 bytes, words, and last the three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + len(SPECIAL):
        raise ValueError(f"a byte-level vocabulary has at least {len(alphabet) + len(SPECIAL)} ids")
    ids = {byte: index for index, byte in enumerate(alphabet)}
    merges = []
    for stem, letter in _words():
        if len(ids) == size - len(SPECIAL):
            break
        merges.append((stem, letter))
        ids[stem + letter] = len(ids)
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _words() -> Iterator[tuple[str, str]]:
    """Merges in the order of their ids: (existing token, letter to append), with and without a space in front."""
    for length in range(1, 5):
        spaced = ((SPACE + "".join(stem), letter) for *stem, letter in product(ascii_lowercase, repeat=length))
        bare = (("".join(stem), letter) for *stem, letter in product(ascii_lowercase, repeat=length) if stem)
        yield from chain(spaced, bare)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _adapter_config(rank: int, targets: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """All weights, split into files of about `SHARD` bytes."""
    part: dict[str, tuple[int, ...]] = {}
    size = 0
    layers = (tensor for layer in range(shape.layers) for tensor in shape.tensors(layer))
    for name, dims in (*shape.ends(), *layers):
        part[name] = dims
        size += 2 * math.prod(dims)
        if size >= SHARD:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)


def _normal(size: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    made = torch.empty(size, dtype=torch.bfloat16, device=generator.device).normal_(0, std, generator=generator)
    return made.cpu()


def _weight(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16) if "norm" in name else _normal(size, 0.02, generator)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder that replaces `folder` once it is completely written."""
    staging = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _up_to_date(record: Path, folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether `folder` exists and was written with these arguments; otherwise it is removed and they are recorded."""
    if folder.is_dir() and record.is_file() and json.loads(record.read_text()) == arguments:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _write_json(record, arguments)
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--adapters", type=int, default=0, help="number of adapters")
    parser.add_argument("--rank", default="16", help="rank, or ranks that the adapters cycle through: 8,16,64,128")
    parser.add_argument("--targets", help="module names, comma-separated (default: all linear modules)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: .bench/SHAPE")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    out: Path = args.out or Path(".bench") / args.shape
    ranks = [int(rank) for rank in args.rank.split(",")]
    targets = args.targets.split(",") if args.targets else None
    if not _up_to_date(out / "model.json", out / "model", {"shape": args.shape, "seed": args.seed}):
        make_model(shape, out / "model", seed=args.seed)
    _up_to_date(
        out / "adapters.json",
        out / "adapters",
        {"shape": args.shape, "ranks": ranks, "targets": targets, "seed": args.seed},
    )
    for number in range(args.adapters):
        folder = out / "adapters" / f"a{number:04}"
        if not folder.is_dir():
            rank = ranks[number % len(ranks)]
            make_adapter(shape, folder, rank=rank, seed=args.seed + 1 + number, targets=targets)
    print(out)


if __name__ == "__main__":
    main()
