"""An adapter in training: master weights, gradients, AdamW's moments, and the weights that are computed with.

Each of these is one flat float32 tensor of one layout, so that a step of the optimizer is a few operations whatever the
number of modules. The base computes with a copy whose B has the scaling folded in (`kernels.contract.Delta`): it is
exactly the lowered form that a server loads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import Adapter, BaseShape, ModuleOverride, Prefix
from lora_serve.engine.training.initial_weights import InitialWeights, lora_weights
from lora_serve.engine.training.method_settings import AdapterSettings, Ia3Settings
from lora_serve.engine.training.trainable_layout import FlatLayer, TrainableLayout
from lora_serve.engine.training.training_settings import AdamSettings, LoraSettings
from lora_serve.engine.training.virtual_token_settings import PromptTuningSettings
from lora_serve.errors import BadRequest
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.model.training_step import DeltaDropout, Gain, Magnitude

FLATS = 5  # masters, computed weights, gradients, two moments
STEP_FLATS = 2  # AdamW's intermediate results
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True)
class OptimizerResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: of all gradients, before clipping.
    """

    grad_norm: float
    learning_rate: float
    steps: int


def adapter_bytes(base: BaseShape, settings: AdapterSettings) -> int:
    """Bytes of an adapter in training. Raises BadRequest for settings that do not fit the base."""
    return _layout_bytes(settings.layout(base))


def _layout_bytes(layout: TrainableLayout) -> int:
    return 4 * (FLATS * layout.size + (layout.encoder.encoder.working if layout.encoder else 0))


def step_bytes(adapter: int) -> int:
    """Bytes that a step of the optimizer takes while it runs, of an adapter of so many."""
    return adapter // FLATS * STEP_FLATS


class TrainableAdapter:
    """An adapter over a base, with its optimizer.

    Attributes:
        settings: of the adapter.
        layout: its parts, in each of the flat tensors.
        masters, gradients: flat float32 tensors.
        slot: its place in the base's pointer tables; None after `close`.
        magnitudes, gains: DoRA's and IA³'s, by module.
        steps: of the optimizer so far.
        passes: that have drawn a dropout mask.

    Args:
        initial: `lora_weights`; None: they are computed now.
    Raises BadRequest for settings that do not fit the base, torch.OutOfMemoryError without effect.
    """

    def __init__(
        self,
        name: str,
        base: TrainableBase,
        settings: AdapterSettings,
        adam: AdamSettings | None = None,
        initial: Mapping[str, InitialWeights] | None = None,
    ) -> None:
        self.name, self.settings, self._base = name, settings, base
        self._adam = adam or AdamSettings()
        self.layout = settings.layout(base.shape)
        self.masters, self._computed, self.gradients = (
            torch.zeros(self.layout.size, dtype=torch.float32, device=base.device) for _ in range(FLATS - 2)
        )
        self._initialise(initial)
        parameter = nn.Parameter(self.masters, requires_grad=True)
        parameter.grad = self.gradients
        self._optimizer = torch.optim.AdamW(
            [parameter], lr=0.0, betas=self._adam.betas, eps=self._adam.eps, weight_decay=self._adam.weight_decay
        )
        self.steps, self.passes = 0, 0
        self._dropout_seed = settings.seed if isinstance(settings, LoraSettings) else 0
        offsets = {name: layer.offsets for name, layer in self.layers.items()}
        self.slot: int | None = base.deltas.load(Adapter(name, self._computed, offsets))
        try:
            gradient_slot = base.gradients.load(Adapter(name, self.gradients, offsets))
        except BaseException:
            base.deltas.evict(self.slot)  # else no later adapter would have the same slot of both
            raise
        assert gradient_slot == self.slot, "both have the same adapters, in the same order"
        self.magnitudes = {
            name: Magnitude(layer.m(self._computed), layer.m(self.gradients))
            for name, layer in self.layers.items()
            if layer.magnitude >= 0
        }
        self.gains = {
            name: Gain(gain.values(self._computed), gain.values(self.gradients), gain.on_input)
            for name, gain in self.layout.gains.items()
        }

    def __repr__(self) -> str:
        parts = len(self.layers) + len(self.gains)
        return f"<TrainableAdapter {self.name}: {parts} modules, {self.nbytes} bytes, {self.steps} steps>"

    @property
    def layers(self) -> Mapping[str, FlatLayer]:
        """The modules with matrices."""
        return self.layout.layers

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, the optimizer's among them, which exist from the first step on."""
        return _layout_bytes(self.layout)

    @property
    def base_sites(self) -> Iterable[str]:
        """Paths of all modules of the base that an adapter can have a delta for."""
        return self._base.shape.sites

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max((layer.offsets.rank for layer in self.layers.values()), default=0)

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens before every sequence that are rows of a batch."""
        return self.layout.table.tokens if self.layout.table else 0

    @property
    def prefix_tokens(self) -> int:
        """Number of virtual tokens before every sequence that are keys and values only."""
        return self.layout.prefix.tokens if self.layout.prefix else 0

    @property
    def table(self) -> tuple[Tensor, Tensor] | None:
        """The embeddings of the virtual tokens [tokens, hidden] and their gradient."""
        own = self.layout.table
        return None if own is None else (own.values(self._computed), own.values(self.gradients))

    @property
    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of virtual tokens [tokens, layers · 2, heads, dim] and their gradient."""
        own = self.layout.prefix
        return None if own is None else (own.values(self._computed), own.values(self.gradients))

    @property
    def lowered(self) -> Adapter:
        """The adapter as it is served, in float32; its memory changes with the next step. Not with DoRA."""
        if self.magnitudes:
            raise BadRequest("an adapter with DoRA is lowered from its saved form", param="use_dora")
        overrides = {
            name: ModuleOverride(gain_in=gain.values) if gain.on_input else ModuleOverride(gain_out=gain.values)
            for name, gain in self.gains.items()
        }
        prefix = None if self.table is None else Prefix(self.virtual_tokens, embeddings=self.table[0])
        if self.prefix is not None:
            parts = self.prefix[0].unbind(1)
            prefix = Prefix(self.prefix_tokens, keys=parts[::2], values=parts[1::2])
        offsets = {name: layer.offsets for name, layer in self.layers.items()}
        return Adapter(self.name, self._computed, offsets, overrides, prefix)

    def draw_dropout(self) -> DeltaDropout | None:
        """The dropout of a new pass with gradients, if the adapter has any: each pass has a mask of its own."""
        if not isinstance(self.settings, LoraSettings) or not self.settings.lora_dropout:
            return None
        drawn = hashlib.blake2b(f"{self._dropout_seed} {self.passes}".encode(), digest_size=7).digest()
        self.passes += 1
        return DeltaDropout(self.settings.lora_dropout, int.from_bytes(drawn, "big"))

    def optimizer_step(self, learning_rate: float, adam: AdamSettings | None = None) -> OptimizerResult:
        """One step of AdamW over the gradients added since the last one, which are zeroed.

        Args:
            adam: its settings from this step on; None: as they are.
        Raises BadRequest without effect for a learning rate that is none. Also if gradients are not finite; then the
        weights stay, and the gradients are zeroed.
        """
        if not 0 <= learning_rate <= torch.finfo(torch.float32).max:  # NaN is not either
            raise BadRequest(f"a learning rate of {learning_rate} is none", param="learning_rate")
        if adam is not None:
            self._adam = adam
            own = {"betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay}
            self._optimizer.param_groups[0].update(own)
        for layer in self.layers.values():  # they are those of B with its scaling
            if layer.module.scaling != 1:
                layer.b(self.gradients).mul_(layer.module.scaling)
            for fixed in layer.initial(self.gradients):
                fixed.zero_()
        if self.layout.encoder is not None:
            self.layout.encoder.backward(self.masters, self.gradients)
        norm = float(torch.linalg.vector_norm(self.gradients))
        if not math.isfinite(norm):
            self.gradients.zero_()
            raise BadRequest(f"the gradient of {self.name!r} is not finite after {self.steps} steps; try a lower rate")
        if 0 < self._adam.max_grad_norm < norm:
            self.gradients.mul_(self._adam.max_grad_norm / (norm + 1e-6))
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        for layer in self.layers.values():  # weight decay has changed them
            for fixed, kept in zip(layer.initial(self.masters), layer.initial(self._computed), strict=True):
                fixed.copy_(kept)
        self.gradients.zero_()
        self.steps += 1
        self._refresh()
        return OptimizerResult(norm, learning_rate, self.steps)

    def state(self) -> dict[str, Tensor]:
        """Master weights and moments, for a checkpoint; copies."""
        moments = self._optimizer.state.get(self._optimizer.param_groups[0]["params"][0], {})
        found = {"masters": self.masters} | {key: moments[key] for key in MOMENTS if key in moments}
        numbers = {"steps": self.steps, "passes": self.passes, "seed": self._dropout_seed}
        counts = {name: torch.tensor(number) for name, number in numbers.items()}
        return {key: tensor.clone() for key, tensor in found.items()} | counts

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state` of an adapter with the same settings.

        Raises BadRequest if it does not fit, and torch.OutOfMemoryError, without effect.
        """
        numbers, flats = ("steps", "passes", "seed"), ("masters", *(key for key in MOMENTS if key in state))
        whole = all(key in state for key in (*numbers, "masters")) and len(flats) in (1, 1 + len(MOMENTS))
        if not whole or any(state[key].shape != self.masters.shape for key in flats):
            raise BadRequest(f"the checkpoint of {self.name!r} is of an adapter with other settings")
        moments = {key: state[key].to(self.masters, copy=True) for key in flats[1:]}  # may run out of memory
        self.steps, self.passes, self._dropout_seed = (int(state[key]) for key in numbers)
        self.masters.copy_(state["masters"])
        self.gradients.zero_()
        parameter = self._optimizer.param_groups[0]["params"][0]
        self._optimizer.state.pop(parameter, None)
        if moments:
            self._optimizer.state[parameter] = {"step": torch.tensor(float(self.steps)), **moments}
        self._refresh()

    def close(self) -> None:
        """Free the slot; the weights can still be read."""
        if self.slot is not None:
            self._base.deltas.evict(self.slot)
            self._base.gradients.evict(self.slot)
            self.slot = None

    @torch.no_grad()
    def _initialise(self, initial: Mapping[str, InitialWeights] | None) -> None:
        """The weights that the settings ask for; DoRA's magnitude is ‖W‖. Nothing changes before the first step."""
        settings = self.settings
        generator = torch.Generator()
        if isinstance(settings, LoraSettings):
            for name, weights in (lora_weights(self._base, settings) if initial is None else initial).items():
                self._initialise_layer(self.layers[name], weights)
        for gain in self.layout.gains.values():
            gain.values(self.masters).fill_(1)
        virtual = self.layout.table or self.layout.prefix
        if not isinstance(settings, LoraSettings | Ia3Settings):
            generator.manual_seed(settings.seed)
        if self.layout.encoder is not None:
            parameters = self.layout.encoder.parameters(self.masters)
            for name, drawn in self.layout.encoder.encoder.initial(generator):
                parameters[name].copy_(drawn)
        elif virtual is not None:
            values = virtual.values(self.masters)
            if isinstance(settings, PromptTuningSettings) and settings.prompt_tuning_init == "SAMPLE_VOCAB":
                ids = torch.randint(0, self._base.vocabulary, (len(values),), generator=generator)
                values.copy_(self._base.embed(ids.to(values.device)))
            else:
                values.copy_(torch.randn(values.shape, generator=generator))
        self._refresh(first=True)

    def _initialise_layer(self, layer: FlatLayer, weights: InitialWeights) -> None:
        layer.a(self.masters).copy_(weights.a)
        if weights.b is not None:
            layer.b(self.masters).copy_(weights.b.T)
        if layer.subtracts:
            fixed_a, fixed_b = layer.initial(self.masters)
            fixed_a.copy_(layer.a(self.masters))
            fixed_b.copy_(layer.b(self.masters)).mul_(-layer.module.scaling)
        if weights.magnitude is not None:
            layer.m(self.masters).copy_(weights.magnitude)

    def _refresh(self, *, first: bool = False) -> None:
        """Bring the weights that are computed with up to date."""
        if self.layout.encoder is not None:
            self.layout.encoder.encode(self.masters)
        self._computed.copy_(self.masters)
        for layer in self.layers.values():
            if layer.module.scaling != 1:
                layer.b(self._computed).mul_(layer.module.scaling)
        if not first:
            for magnitude in self.magnitudes.values():
                magnitude.norm = None
