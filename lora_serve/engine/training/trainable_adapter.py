"""An adapter in training: master weights, gradients, AdamW's moments, and the weights that are computed with.

Each of these is one flat float32 tensor of one layout, so that a step of the optimizer is a few operations whatever the
number of modules. The base computes with a copy whose B has the scaling folded in (`kernels.contract.Delta`): it is
exactly the lowered form that a server loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import ALIGNMENT, Adapter, BaseShape, MatrixOffsets
from lora_serve.engine.training.training_settings import AdamSettings, AdaptedSite, LoraSettings
from lora_serve.errors import BadRequest
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.model.training_step import Magnitude

FLATS = 5  # masters, computed weights, gradients, two moments
_STEP = ALIGNMENT // 4  # elements


@dataclass(frozen=True)
class FlatLayer:
    """One module's part of the flat tensors; offsets in elements.

    Attributes:
        magnitude: offset of DoRA's magnitude; -1 without.
    """

    module: AdaptedSite
    offsets: MatrixOffsets
    magnitude: int

    def a(self, flat: Tensor) -> Tensor:
        """[rank, in], a view."""
        return self.offsets.views(self.module.site, flat).a

    def b(self, flat: Tensor) -> Tensor:
        """[rank, out], a view; PEFT's transposed."""
        return self.offsets.views(self.module.site, flat).b

    def m(self, flat: Tensor) -> Tensor:
        """[out], a view."""
        return flat[self.magnitude : self.magnitude + self.module.site.out_features]


@dataclass(frozen=True)
class OptimizerResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: of all gradients, before clipping.
    """

    grad_norm: float
    learning_rate: float
    steps: int


def lay_out(modules: Mapping[str, AdaptedSite], *, dora: bool) -> tuple[dict[str, FlatLayer], int]:
    """Places of all modules' matrices in a flat tensor, and its size in elements."""
    layers, size = {}, 0

    def place(elements: int) -> int:
        nonlocal size
        start, size = size, size + -(-elements // _STEP) * _STEP
        return start

    for name, module in modules.items():
        site, rank = module.site, module.rank
        offsets = MatrixOffsets(place(rank * site.in_features), place(rank * site.out_features), rank)
        layers[name] = FlatLayer(module, offsets, place(site.out_features) if dora else -1)
    return layers, size


def adapter_bytes(base: BaseShape, settings: LoraSettings) -> int:
    """Bytes of an adapter in training. Raises BadRequest for settings that do not fit the base."""
    return FLATS * 4 * lay_out(settings.modules(base), dora=settings.use_dora)[1]


class TrainableAdapter:
    """A LoRA adapter over a base, with its optimizer.

    Attributes:
        settings: of the adapter.
        layers: its modules.
        masters, gradients: flat float32 tensors.
        slot: its place in the base's pointer tables; None after `close`.
        magnitudes: DoRA's, by module.
        steps: of the optimizer so far.

    Raises BadRequest for settings that do not fit the base, torch.OutOfMemoryError without effect.
    """

    def __init__(
        self, name: str, base: TrainableBase, settings: LoraSettings, adam: AdamSettings | None = None
    ) -> None:
        self.name, self.settings, self._base = name, settings, base
        self._adam = adam or AdamSettings()
        self.layers, size = lay_out(settings.modules(base.shape), dora=settings.use_dora)
        self.masters, self._computed, self.gradients = (
            torch.zeros(size, dtype=torch.float32, device=base.device) for _ in range(FLATS - 2)
        )
        self._initialise()
        parameter = nn.Parameter(self.masters, requires_grad=True)
        parameter.grad = self.gradients
        self._optimizer = torch.optim.AdamW(
            [parameter], lr=0.0, betas=self._adam.betas, eps=self._adam.eps, weight_decay=self._adam.weight_decay
        )
        self.steps = 0
        offsets = {name: layer.offsets for name, layer in self.layers.items()}
        self.slot: int | None = base.deltas.load(Adapter(name, self._computed, offsets))
        gradient_slot = base.gradients.load(Adapter(name, self.gradients, offsets))
        assert gradient_slot == self.slot, "both have the same adapters, in the same order"
        self.magnitudes = {
            name: Magnitude(layer.m(self._computed), layer.m(self.gradients))
            for name, layer in self.layers.items()
            if layer.magnitude >= 0
        }

    def __repr__(self) -> str:
        return f"<TrainableAdapter {self.name}: {len(self.layers)} modules, {self.nbytes} bytes, {self.steps} steps>"

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, the optimizer's among them, which exist from the first step on."""
        return FLATS * self.masters.nbytes

    @property
    def base_sites(self) -> Iterable[str]:
        """Paths of all modules of the base that an adapter can have a delta for."""
        return self._base.shape.sites

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max(layer.module.rank for layer in self.layers.values())

    @property
    def lowered(self) -> Adapter:
        """The adapter as it is served, in float32; its memory changes with the next step. Not with DoRA."""
        if self.settings.use_dora:
            raise BadRequest("an adapter with DoRA is lowered from its saved form", param="use_dora")
        return Adapter(self.name, self._computed, {name: layer.offsets for name, layer in self.layers.items()})

    def optimizer_step(self, learning_rate: float, adam: AdamSettings | None = None) -> OptimizerResult:
        """One step of AdamW over the gradients added since the last one, which are zeroed.

        Args:
            adam: its settings from this step on; None: as they are.
        Raises BadRequest if they are not finite; then the weights stay, and the gradients are zeroed as well.
        """
        if adam is not None:
            self._adam = adam
            own = {"betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay}
            self._optimizer.param_groups[0].update(own)
        for layer in self.layers.values():  # they are those of B with its scaling
            if layer.module.scaling != 1:
                layer.b(self.gradients).mul_(layer.module.scaling)
        norm = float(torch.linalg.vector_norm(self.gradients))
        if not math.isfinite(norm):
            self.gradients.zero_()
            raise BadRequest(f"the gradient of {self.name!r} is not finite after {self.steps} steps; try a lower rate")
        if 0 < self._adam.max_grad_norm < norm:
            self.gradients.mul_(self._adam.max_grad_norm / (norm + 1e-6))
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self.gradients.zero_()
        self.steps += 1
        self._refresh()
        return OptimizerResult(norm, learning_rate, self.steps)

    def state(self) -> dict[str, Tensor]:
        """Master weights and moments, for a checkpoint; copies."""
        moments = self._optimizer.state.get(self._optimizer.param_groups[0]["params"][0], {})
        found = {"masters": self.masters} | {key: moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        return {key: tensor.clone() for key, tensor in found.items()} | {"steps": torch.tensor(self.steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state` of an adapter with the same settings. Raises BadRequest if it does not fit."""
        if state["masters"].shape != self.masters.shape:
            raise BadRequest(f"the checkpoint of {self.name!r} is of an adapter with other settings")
        self.steps = int(state["steps"])
        self.masters.copy_(state["masters"])
        self.gradients.zero_()
        parameter = self._optimizer.param_groups[0]["params"][0]
        self._optimizer.state.pop(parameter, None)
        if "exp_avg" in state:
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self.steps)),
                "exp_avg": state["exp_avg"].to(self.masters, copy=True),
                "exp_avg_sq": state["exp_avg_sq"].to(self.masters, copy=True),
            }
        self._refresh()

    def close(self) -> None:
        """Free the slot; the weights can still be read."""
        if self.slot is not None:
            self._base.deltas.evict(self.slot)
            self._base.gradients.evict(self.slot)
            self.slot = None

    def _initialise(self) -> None:
        """PEFT's: A as `nn.Linear` has its weights, B zero; DoRA's magnitude ‖W‖, so that nothing changes yet."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for name, layer in self.layers.items():
            a = torch.empty(layer.module.rank, layer.module.site.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            layer.a(self.masters).copy_(a)
            if layer.magnitude >= 0:
                layer.m(self.masters).copy_(self._base.weight_norm(name))
        self._refresh(first=True)

    def _refresh(self, *, first: bool = False) -> None:
        """Bring the weights that are computed with up to date."""
        self._computed.copy_(self.masters)
        for layer in self.layers.values():
            if layer.module.scaling != 1:
                layer.b(self._computed).mul_(layer.module.scaling)
        if not first:
            for magnitude in self.magnitudes.values():
                magnitude.norm = None
