"""Settings of an adapter and of its optimizer, validated; the names and defaults are PEFT's and torch's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.formats.fields import Patterns
from lora_serve.adapters.formats.targets import Targets
from lora_serve.errors import AdapterInvalid, BadRequest

MAX_RANK = 1024


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter to be trained, as in PEFT's `LoraConfig`.

    Attributes:
        target_modules: names of linear modules, as PEFT matches them, or "all-linear".
        rank_pattern, alpha_pattern: ranks and alphas of modules that have others, by expression.
        use_rslora: scale by α/√r instead of α/r.
        use_dora: train a magnitude for each output as well.
        seed: of A's initialisation; B is zero.
    """

    r: int = 16
    lora_alpha: float = 32
    target_modules: str | Sequence[str] = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    seed: int = 0

    def peft_config(self, targets: str | Sequence[str] | None = None) -> dict[str, Any]:
        """The adapter's `adapter_config.json`.

        Args:
            targets: what it says of the modules; None: `target_modules`.
        """
        targets = self.target_modules if targets is None else targets
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }

    def modules(self, base: BaseShape) -> dict[str, AdaptedSite]:
        """The linear modules that are adapted, by path. Raises BadRequest naming the field at fault."""
        try:
            config = self.peft_config()
            targets = Targets(config, base)
            ranks, alphas = Patterns(config, "rank_pattern"), Patterns(config, "alpha_pattern")
            found = {}
            for name, site in base.sites.items():
                if name.endswith("]") or not targets.names(name):  # a mixture's experts are parameters, not modules
                    continue
                rank, alpha = ranks.get(name, self.r), alphas.get(name, self.lora_alpha)
                if rank != int(rank) or not 0 < rank <= MAX_RANK:
                    raise BadRequest(f"{name} would have rank {rank}; 1 to {MAX_RANK} are trained", param="r")
                scaling = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
                if not math.isfinite(scaling) or scaling <= 0:
                    raise BadRequest(f"{name} would have alpha {alpha}; it is positive", param="lora_alpha")
                found[name] = AdaptedSite(site, int(rank), scaling)
        except AdapterInvalid as error:
            raise BadRequest(error.message, param="target_modules") from error
        if targets.unreadable:
            raise BadRequest(f"{targets.unreadable} is not a plain regular expression", param=targets.unreadable)
        named = [] if isinstance(self.target_modules, str) else self.target_modules
        missing = [name for name in named if not any(path == name or path.endswith(f".{name}") for path in found)]
        if missing or not found:
            raise BadRequest(
                f"{', '.join(missing) or self.target_modules} is no linear module of the base; "
                f"some are {', '.join(sorted({name.rpartition('.')[2] for name in base.sites})[:12])}",
                param="target_modules",
            )
        return found


@dataclass(frozen=True)
class AdaptedSite:
    """A linear module of the base with the rank and the scaling of its delta."""

    site: Site
    rank: int
    scaling: float


@dataclass(frozen=True)
class AdamSettings:
    """AdamW's settings, as in `torch.optim.AdamW`, and the largest norm of the gradient.

    Attributes:
        max_grad_norm: larger gradients are scaled down to it; 0: none are.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "max_grad_norm": self.max_grad_norm >= 0,
        }
        for name, fits in checks.items():
            if not fits or not all(map(math.isfinite, (*self.betas, self.eps, self.weight_decay, self.max_grad_norm))):
                raise BadRequest(f"{name} = {getattr(self, name)} is out of its range", param=name)
