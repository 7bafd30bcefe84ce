"""Settings of an adapter and of its optimizer, validated; the names and defaults are PEFT's and torch's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.formats.fields import Patterns
from lora_serve.engine.training.target_sites import target_sites
from lora_serve.engine.training.trainable_layout import AdaptedSite, TrainableLayout
from lora_serve.errors import AdapterInvalid, BadRequest

MAX_RANK = 1024
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
INITIALISATIONS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_[number]", "olora")


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter to be trained, as in PEFT's `LoraConfig`.

    Attributes:
        target_modules: names of linear modules, as PEFT matches them, or "all-linear".
        rank_pattern, alpha_pattern: ranks and alphas of modules that have others, by expression.
        use_rslora: scale by α/√r instead of α/r.
        use_dora: train a magnitude for each output as well.
        seed: of the initialisation, and of dropout.
        lora_dropout: share of the delta's input that is left out at random in passes with gradients; not with
            DoRA, PiSSA and OLoRA.
        init_lora_weights: PEFT's "default" (its True: A uniform, B zero), "gaussian" (A normal, B zero), "orthogonal",
            or "pissa", "pissa_niter_4" and "olora", which begin with a part of W. PEFT takes that part out of W; here
            W stays, and the initial delta is subtracted: y = W x + s (B A − B0 A0) x.
        train_lm_head: adapt the LM head beside the target modules; a tied embedding stays as it is.
    """

    SIZED_BY: ClassVar = "r"

    r: int = 16
    lora_alpha: float = 32
    target_modules: str | Sequence[str] = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    seed: int = 0
    lora_dropout: float = 0.0
    init_lora_weights: str = "default"
    train_lm_head: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not re.fullmatch(r"default|gaussian|orthogonal|olora|pissa(_niter_[1-9]\d?)?", self.init_lora_weights):
            raise BadRequest(
                f"init_lora_weights {self.init_lora_weights!r} is not trained here, only {', '.join(INITIALISATIONS)}",
                param="init_lora_weights",
            )
        if not 0 <= self.lora_dropout < 1:
            raise BadRequest(f"lora_dropout = {self.lora_dropout} is not from 0 to below 1", param="lora_dropout")
        if self.lora_dropout and (self.use_dora or self.subtracts):
            raise BadRequest(
                "lora_dropout is not trained together with use_dora, or with init_lora_weights pissa or olora",
                param="lora_dropout",
            )

    @property
    def subtracts(self) -> bool:
        """Whether the initial delta is subtracted; then the adapter's files have twice the rank."""
        return self.init_lora_weights == "olora" or self.init_lora_weights.startswith("pissa")

    @property
    def reads_weights(self) -> bool:
        """Whether the adapter begins with something computed from every weight, which takes long."""
        return self.subtracts or self.use_dora

    def layout(self, base: BaseShape) -> TrainableLayout:
        """The adapter's parts. Raises BadRequest naming the field that does not fit the base."""
        return TrainableLayout.of_matrices(self.modules(base), dora=self.use_dora, subtract=self.subtracts)

    def peft_config(self, targets: str | Sequence[str] | None = None) -> dict[str, Any]:
        """The adapter's `adapter_config.json`.

        Args:
            targets: what it says of the modules; None: `target_modules`.
        """
        targets = self.target_modules if targets is None else targets
        ranks = 2 if self.subtracts else 1
        alphas = math.sqrt(ranks) if self.use_rslora else ranks
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r * ranks,
            "lora_alpha": self.lora_alpha * alphas,
            "lora_dropout": self.lora_dropout,
            "bias": "none",
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "rank_pattern": {name: rank * ranks for name, rank in self.rank_pattern.items()},
            "alpha_pattern": {name: alpha * alphas for name, alpha in self.alpha_pattern.items()},
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }

    def modules(self, base: BaseShape) -> dict[str, AdaptedSite]:
        """The linear modules that are adapted, by path. Raises BadRequest naming the field at fault."""
        config = replace(self, init_lora_weights="default").peft_config()
        sites = target_sites(config, base, also=[base.head] if self.train_lm_head else [])
        try:
            ranks, alphas = Patterns(config, "rank_pattern"), Patterns(config, "alpha_pattern")
            found = {}
            for name, site in sites.items():
                rank, alpha = ranks.get(name, self.r), alphas.get(name, self.lora_alpha)
                if rank != int(rank) or not 0 < rank <= MAX_RANK:
                    raise BadRequest(f"{name} would have rank {rank}; 1 to {MAX_RANK} are trained", param="r")
                scaling = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
                if not _SMALLEST <= scaling <= _LARGEST:
                    raise BadRequest(
                        f"{name} would have alpha {alpha}; it is positive, and a float32", param="lora_alpha"
                    )
                self._check_initialisation(name, site, int(rank))
                found[name] = AdaptedSite(site, int(rank), scaling)
        except AdapterInvalid as error:
            raise BadRequest(error.message, param="target_modules") from error
        return found

    def _check_initialisation(self, name: str, site: Site, rank: int) -> None:
        """Raise BadRequest where PEFT's initialisation has no matrices of this shape."""
        most = min(site.in_features, site.out_features)
        if self.subtracts and rank > most:
            raise BadRequest(f"{self.init_lora_weights}: {name} allows a rank of {most}, not {rank}", param="r")
        if self.init_lora_weights == "orthogonal" and rank % 2:
            raise BadRequest(f"orthogonal: {name} would have rank {rank}; it is even", param="r")
        if self.init_lora_weights == "olora" and site.transposed:
            raise BadRequest(f"olora: PEFT's has wrong shapes for a Conv1D ({name})", param="init_lora_weights")


def check_seed(seed: int) -> None:
    """Raise BadRequest unless it is the seed of a generator, and a number that a state can hold."""
    if not 0 <= seed < 1 << 63:
        raise BadRequest("seed is not from 0 to below 2 to the power of 63", param="seed")


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
            "eps": self.eps >= _SMALLEST,  # else it is 0 in float32, and a weight without a gradient becomes NaN
            "weight_decay": self.weight_decay >= 0,
            "max_grad_norm": self.max_grad_norm >= 0,
        }
        for name, fits in checks.items():
            if not fits or not all(map(math.isfinite, (*self.betas, self.eps, self.weight_decay, self.max_grad_norm))):
                raise BadRequest(f"{name} = {getattr(self, name)} is out of its range", param=name)
