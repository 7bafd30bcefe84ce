"""Reference shapes with random weights, and PEFT adapters for them, as the folders that any server reads.

    python bench/make_model.py --shape qwen2.5-0.5b --adapters 32 --rank 16

writes `.bench/qwen2.5-0.5b/model` and `.bench/qwen2.5-0.5b/adapters/a0000 …`. Speed does not depend on what the weights
say, only on their sizes; so no weights are downloaded. Everything follows from the seed. What is there already, made
from the same arguments, is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

if __package__ in (None, ""):  # started as a file: the repository's root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.shapes import SHAPES, Shape
from bench.vocabulary import make_tokenizer

SHARD = 4 << 30  # bytes


def make_model(shape: Shape, folder: Path, *, seed: int = 0) -> None:
    """Write a bf16 safetensors model folder with a tokenizer."""
    with _complete(folder) as staging:
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
    """Write a PEFT LoRA folder: random A and B, neither zero, on `targets` (names of modules; None: all linear)."""
    sites = {name: size for name, size in shape.linears().items() if targets is None or _leaf(name) in targets}
    if targets is not None and {_leaf(name) for name in sites} != set(targets):
        raise ValueError(f"targets are among {', '.join(map(_leaf, shape.linears()))}")
    with _complete(folder) as staging:
        generator = _generator(seed)
        weights = {}
        for layer in range(shape.layers):
            for name, (inputs, outputs) in sites.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                weights[f"{prefix}.lora_A.weight"] = _normal((rank, inputs), 1 / math.sqrt(inputs), generator)
                weights[f"{prefix}.lora_B.weight"] = _normal((outputs, rank), 0.02, generator)
        save_file(weights, staging / "adapter_model.safetensors", {"format": "pt"})
        _write_json(staging / "adapter_config.json", _adapter_config(rank, [_leaf(name) for name in sites]))


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
    """All tensors, in parts of about `SHARD` bytes."""
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
def _complete(folder: Path) -> Iterator[Path]:
    """A folder that appears under its own name only when everything is in it; replaces what was there."""
    staging = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _kept(recipe: Path, folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` is there, made as `recipe` says; if it was made otherwise it is removed."""
    if folder.is_dir() and recipe.is_file() and json.loads(recipe.read_text()) == made_from:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _write_json(recipe, made_from)
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--adapters", type=int, default=0, help="how many")
    parser.add_argument("--rank", default="16", help="rank, or a mix that is dealt out in turn: 8,16,64,128")
    parser.add_argument("--targets", help="modules to adapt, comma separated (default: all linear ones)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: .bench/SHAPE")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    out: Path = args.out or Path(".bench") / args.shape
    ranks = [int(rank) for rank in args.rank.split(",")]
    targets = args.targets.split(",") if args.targets else None
    if not _kept(out / "model.json", out / "model", {"shape": args.shape, "seed": args.seed}):
        make_model(shape, out / "model", seed=args.seed)
    _kept(
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
