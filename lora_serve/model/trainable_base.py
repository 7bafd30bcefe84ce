"""The resident base as training runs it: layer by layer, under autograd, on the weights that serve.

The model's modules are copied before any of them is replaced for serving, without their weights: parameters are shared,
and linear modules, experts and the input embedding read the resident ones (`trainable_linear.py`). So the modelling
code runs as it was written, and there is no second copy of the weights.

Only the inputs of decoder layers are kept, unless there is memory for more. Each layer is computed again when its
gradient is asked for (gradient checkpointing), and no step is longer than one layer of one batch, so that an engine can
do something else in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.contract import Kernels, Segments
from lora_serve.kernels.training_contract import PART_OUTPUTS
from lora_serve.model.external_quantization import is_externally_quantized
from lora_serve.model.loaded_model import LoadedModel
from lora_serve.model.self_check import QUANTIZED_TOLERANCE, refusing, relative_error
from lora_serve.model.sequence_attention import SEQUENCE_ATTENTION
from lora_serve.model.shape import base_module
from lora_serve.model.trainable_experts import FrozenExperts
from lora_serve.model.trainable_linear import (
    HeadReading,
    ResidentEmbedding,
    TrainableGroup,
    TrainableHead,
    TrainableLinear,
    TrainableSites,
    TrainingContext,
    resident_layer,
)
from lora_serve.model.training_step import TrainingStep

UNPACKED = 1 << 23  # weights that are unpacked at a time, as `kernels/cpu/matmul.py` does

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]  # a layer's arguments besides the hidden states


class HeadCall(NamedTuple):
    """Logits [rows, width] of a part of the vocabulary, and the rows that the head read, the final norm's outputs.

    Attributes:
        normed: [rows, hidden], as they come from the hidden states.
        given: the same numbers, to which the gradient of the logits goes.
    """

    logits: Tensor
    normed: Tensor
    given: Tensor


class _NotedCall(NamedTuple):
    """How the model's forward called a layer."""

    hidden: Tensor
    arguments: LayerCall


class TrainableBase:
    """A differentiable view of a base.

    Attributes:
        shape: of the base.
        deltas, gradients: slots of the adapters that are trained: their matrices, and the gradients of these, float32.
        layers: number of decoder layers.
        device, dtype: of activations.
        layer_weights: numbers in the linear modules of a layer, on average.
        vocabulary: number of logits.
        max_length: of a sequence.
        token_bytes: of what one layer saves of each token for its backward pass; measured by `check`.
        logit_bytes: of one logit, and of what the model saves of it for its backward pass; measured by `check`.
        unpacked_bytes: of the weights that are unpacked for a product.
        head_parts: parts of the vocabulary whose logits are computed at a time. They are about as many weights as a
            layer, and fixed, so that sums over them have the same bits whatever else is in a batch.

    Args:
        loaded: the model as it was loaded; made before `ResidentBase` replaces its modules.
        slots: the most adapters that are trained at a time.
        head_weights: of the LM head, that are computed with at a time; None: as many as a layer has.
    Raises ModelUnsupported if it cannot be trained layer by layer, or is shared by several devices.
    """

    def __init__(self, loaded: LoadedModel, kernels: Kernels, slots: int, *, head_weights: int | None = None) -> None:
        self.shape, self.device, self.dtype, self.vocabulary = (
            loaded.shape,
            loaded.device,
            loaded.dtype,
            loaded.vocab_size,
        )
        self._kind, self.max_length, self.token_bytes = loaded.shape.model_type, loaded.max_model_len, 0
        if loaded.sharding is not None:
            raise ModelUnsupported("a base that several devices share cannot be trained; leave --tensor-parallel away")
        if loaded.headless or not loaded.shape.body:
            raise ModelUnsupported(f"a {self._kind} base without an LM head cannot be trained")
        self._context = TrainingContext(kernels)
        self._windows = loaded.windows
        self.deltas, self.gradients = (DeviceSlots(loaded.shape, slots, torch.float32, loaded.device) for _ in range(2))
        self.logit_bytes = loaded.dtype.itemsize
        self._oracle = loaded.oracle
        self._tolerance = loaded.oracle.tolerance if loaded.scheme is None else QUANTIZED_TOLERANCE
        self._resident: Any = loaded.model
        self._model: Any = self._copy(loaded)
        self._model.set_attn_implementation(SEQUENCE_ATTENTION)
        self._layers: list[nn.Module] = [*_decoder_layers(self._model, loaded.shape.body, self._kind)]
        self.layers = len(self._layers)
        sites = {name: site for name, site in self.shape.sites.items() if name != self.shape.head}
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        self._outside = [
            (name, deltas, index)
            for names, deltas in self.deltas.groups.items()
            for index, name in enumerate(names)
            if name in sites and not name.endswith("]") and id(self._model.get_submodule(name)) not in inside
        ]  # linear modules between the embedding and the layers, or the layers and the head
        self.layer_weights = sum(site.in_features * site.out_features for site in sites.values()) // self.layers
        self.head_parts = self._cut_head(loaded, head_weights or self.layer_weights)
        external = {name for name, module in loaded.model.named_modules() if is_externally_quantized(module)}
        self.unpacked_bytes = unpacked_bytes(
            self.shape, self.dtype, external=bool(external), external_head=self.shape.head in external
        )
        self._calls: list[_NotedCall] = []
        self._replacement: Tensor | None = None
        for index, layer in enumerate(self._layers):
            vars(layer)["forward"] = partial(self._probe, index)

    @property
    def free_slots(self) -> int:
        """Number of adapters that can still be added."""
        return self.deltas.slots - len(self.deltas.ranks)

    def begin(
        self, step: TrainingStep, token_ids: Tensor, positions: Tensor, *, gradients: bool = False
    ) -> LayerwisePass:
        """Start a pass over token ids [tokens] at their positions in their sequences: embed them.

        Virtual tokens' rows have any id. The gradients of their tables, and of what adapts modules between the
        embedding and the first layer, come with that of its input.
        """
        body = self._model.get_submodule(self.shape.body)
        self._calls = []  # of a pass that could not begin
        learned = gradients and (len(step.virtual_tokens) > 0 or self._adapted_outside(step))
        with self._running(step), torch.set_grad_enabled(learned):
            body(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                training_step=step,
                training_windows=self._windows,
            )
        calls, self._calls = self._calls, []
        if len(calls) != self.layers:
            raise ModelUnsupported(f"{self._kind} does not call each of its decoder layers once")
        if learned and any(_requires_grad(call.arguments) for call in calls):
            raise ModelUnsupported(
                f"nothing before the first layer is trained on {self._kind}: all layers read embeddings"
            )
        return LayerwisePass(self, step, [call.arguments for call in calls], calls[0].hidden)

    def _adapted_outside(self, step: TrainingStep) -> bool:
        """Whether an adapter of the batch adapts a linear module that is in no layer, and is not the head."""
        return any(
            deltas.get(index, span.slot) is not None or name in span.gains
            for name, deltas, index in self._outside
            for span in step.spans
        )

    def layer(self, index: int, step: TrainingStep, hidden: Tensor, call: LayerCall) -> Tensor:
        """Decoder layer `index` as the modelling code has it: hidden [1, tokens, hidden] → the same."""
        args, kwargs = call
        layer = self._layers[index]
        with self._running(step):
            output: Any = type(layer).forward(layer, hidden, *args, **kwargs)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def head(self, step: TrainingStep, hidden: Tensor, part: slice) -> HeadCall:
        """Final norm, LM head and whatever the model does to logits, of one of `head_parts`; for hidden [rows, hidden].

        Gradients of the logits end at what the head reads, so that the norm's own is computed once for all parts.
        """
        rows = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=self.device)
        self._replacement = hidden[None]
        self._context.head = reading = HeadReading(None if len(self.head_parts) == 1 else part)
        try:
            with self._running(step):
                logits: Tensor = self._model(
                    input_ids=rows,
                    position_ids=rows,
                    use_cache=False,
                    training_step=step,
                    training_windows=self._windows,
                ).logits[0]
        finally:
            self._replacement = self._context.head = None
        if reading.normed is None or reading.given is None:  # the head is no module that is trained
            return HeadCall(logits, hidden, hidden)
        return HeadCall(logits, reading.normed, reading.given)

    @torch.no_grad()
    def weight(self, site: str) -> Tensor:
        """A linear module's weight as it is resident, [out, in]; may be the resident memory itself."""
        packed, _ = resident_layer(base_module(self._resident, site), self._context.kernels)
        return self._context.kernels.unpack(packed)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The input embedding of token ids [n]: [n, hidden]."""
        found: Tensor = self._resident.get_submodule(self.shape.input_embedding)(ids)
        return found

    def check(self) -> None:
        """Compare with the model as it was loaded, in one batch of two sequences. Raises ModelUnsupported."""
        tokens, wanted = self._oracle.tokens, self._oracle.logits
        lengths = [len(own) for own in tokens]
        step = TrainingStep(lengths, (), no_segments(self.device))
        ids = torch.tensor([token for own in tokens for token in own], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        with torch.no_grad(), _training_refused(self._kind), refusing(self._kind):
            running = self.begin(step, ids, positions)
            hidden = running.hidden
            for index in range(self.layers):
                saved = self._saved(partial(self.layer, index, step, hidden, running.calls[index]), hidden)
                self.token_bytes = max(self.token_bytes, -(-sum(saved) // len(ids)))
                hidden = self.layer(index, step, hidden, running.calls[index])
            error = relative_error(self._logits(step, hidden[0]), wanted.flatten(0, 1))
            if not error <= self._tolerance and len(self.head_parts) > 1:  # the model may need all logits at once
                self.head_parts = [slice(0, self.vocabulary)]
                error = relative_error(self._logits(step, hidden[0]), wanted.flatten(0, 1))
            part = self.head_parts[0]
            logits = len(ids) * (part.stop - part.start) * self.dtype.itemsize
            saved = self._saved(lambda: self.head(step, hidden[0], part).logits, hidden)
            self.logit_bytes += sum(each // (len(ids) * (part.stop - part.start)) for each in saved if each >= logits)
        if not error <= self._tolerance:
            raise ModelUnsupported(
                f"{self._kind} cannot be trained: layer by layer its logits differ from its own by {error:.2g}, "
                f"more than {self._tolerance:.2g}"
            )

    def _logits(self, step: TrainingStep, hidden: Tensor) -> Tensor:
        return torch.cat([self.head(step, hidden, part).logits.cpu().float() for part in self.head_parts], 1)

    def _saved(self, run: Callable[[], Tensor], hidden: Tensor) -> list[int]:
        """Bytes of each tensor that is saved for a backward pass, without the base's parameters."""
        parameters = {each.untyped_storage().data_ptr() for each in (*self._model.parameters(), *self._model.buffers())}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        hidden.requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run()
        hidden.requires_grad_(False)
        del output
        return list(saved.values())

    def _probe(self, index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for a decoder layer in the model's forward: notes its arguments, and passes hidden states on."""
        if self._replacement is not None:
            return self._replacement if index == 0 else hidden_states
        if index != len(self._calls):
            raise ModelUnsupported(f"{self._kind} does not call its decoder layers in order")
        self._calls.append(_NotedCall(hidden_states, (args, kwargs)))
        return hidden_states

    @contextmanager
    def _running(self, step: TrainingStep) -> Iterator[None]:
        """Let the modules read this step."""
        self._context.step = step
        try:
            yield
        finally:
            self._context.step = None

    def _cut_head(self, loaded: LoadedModel, weights: int) -> list[slice]:
        """Parts of the vocabulary; one if the head's outputs are not the logits, or it is packed at each call."""
        site = self.shape.sites.get(self.shape.head)
        alone = (self.shape.head,) in self.deltas.groups
        if site is None or not alone or site.out_features != self.vocabulary:
            return [slice(0, self.vocabulary)]
        if is_externally_quantized(base_module(loaded.model, self.shape.head)):
            return [slice(0, self.vocabulary)]
        width = max(1, weights // (site.in_features * PART_OUTPUTS)) * PART_OUTPUTS
        return [slice(at, min(at + width, self.vocabulary)) for at in range(0, self.vocabulary, width)]

    def _copy(self, loaded: LoadedModel) -> Any:
        """The model's modules without weights: parameters are shared, modules whose weights are packed are replaced."""
        model: Any = loaded.model
        shared: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
        embedding = loaded.shape.input_embedding
        shared[id(model.get_submodule(embedding))] = ResidentEmbedding(
            partial(model.get_submodule, embedding), self._context
        )
        for names, deltas in self.deltas.groups.items():
            if names[0].endswith("]"):  # one of a mixture's experts
                experts = names[0].partition("[")[0].rpartition(".")[0]
                module = model.get_submodule(experts)
                shared.setdefault(
                    id(module), FrozenExperts(partial(base_module, model, experts), self._context.kernels)
                )
                continue
            sites = TrainableSites(names, deltas, self.gradients.groups[names], partial(base_module, model))
            group = TrainableGroup(sites, self._context)
            for index, name in enumerate(names):
                kind = TrainableHead if names == (loaded.shape.head,) else TrainableLinear
                linear = kind(group, index, partial(_weight_of, model, name))
                shared[id(model.get_submodule(name))] = linear
        return copy.deepcopy(model, shared)


def unpacked_bytes(shape: BaseShape, dtype: torch.dtype, *, external: bool, external_head: bool = False) -> int:
    """Bytes of the weights that are unpacked for a product: a part of one in float32, packed and transposed.

    Args:
        external: whether another library quantised them: then it is all of those that read one input, and another copy.
        external_head: whether it quantised the LM head, too.
    """
    sizes = {name: site.in_features * site.out_features for name, site in shape.sites.items()}
    if not external:
        return 3 * 4 * min(max(sizes.values()), UNPACKED)
    if not external_head:
        sizes[shape.head] = 0
    widest, group = max(sizes.values()), max(sum(sizes[name] for name in names) for names in shape.groups)
    return group * dtype.itemsize + widest * (4 + dtype.itemsize)


class LayerwisePass:
    """One flat batch on its way through the base, forwards and backwards.

    Attributes:
        calls: arguments of each layer.
        hidden: [1, tokens, hidden], of the last layer that was computed.
    """

    def __init__(self, base: TrainableBase, step: TrainingStep, calls: Sequence[LayerCall], hidden: Tensor) -> None:
        self._base, self._step, self.calls = base, step, calls
        self._embedded, self.hidden = hidden, hidden.detach()
        self._done = 0
        self._edges: list[tuple[Tensor, GradientEdge]] = []  # each layer's input, and its output's place in the graph
        self._outputs: Tensor | None = None  # [layers, 1, tokens, hidden]

    def forward(self, *, gradients: bool, keep: bool) -> None:
        """Compute the next layer.

        Args:
            gradients: whether `backward` will be called.
            keep: what it will need besides the layer's input, instead of computing it again.
        """
        index, self._done = self._done, self._done + 1
        run = partial(self._base.layer, index, self._step, call=self.calls[index])
        if not gradients:
            with torch.no_grad():
                self.hidden = run(self.hidden)
            return
        given = self.hidden.requires_grad_()
        output: Tensor
        if keep:
            with torch.enable_grad():
                output = run(given)
        else:
            output = checkpoint(run, given, use_reentrant=False, preserve_rng_state=False)
        self._edges.append((given, get_gradient_edge(output)))
        self.hidden = self._copy_output(index, output.detach())

    def _copy_output(self, index: int, output: Tensor) -> Tensor:
        """A layer's output where those of all layers are.

        They live as long as the pass, and everything else for a layer at most: between them on the heap, the allocator
        could not use the memory again for tensors of other sizes.
        """
        if self._outputs is None:
            self._outputs = output.new_empty((self._base.layers, *output.shape))
        place = self._outputs[index]
        kept = torch.empty(0, dtype=output.dtype, device=output.device)  # no view: these share a count of changes
        kept.set_(place.untyped_storage(), place.storage_offset(), place.shape, place.stride())
        return kept.copy_(output)

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the last remaining layer's input, of that of its output; the layer is forgotten.

        With the first layer's the gradients of what comes before it are added.
        """
        given, output = self._edges.pop()
        (found,) = torch.autograd.grad(output, given, grad)
        if not self._edges and self._embedded.requires_grad:
            torch.autograd.backward(self._embedded, found)
            for each in self._step.virtual_tokens:
                if each.table.grad is not None:
                    each.gradient.add_(each.table.grad)
        return found


def no_segments(device: torch.device) -> Segments:
    """Segments of a batch without adapters."""
    none = torch.zeros(0, dtype=torch.int32, device=device)
    return Segments(none, none, none, torch.zeros(0, device=device), 0, 0)


def _requires_grad(call: LayerCall) -> bool:
    """Whether a layer's arguments besides the hidden states depend on what is learned."""
    return any(each.requires_grad for each in tree_leaves(call) if isinstance(each, Tensor))


def _weight_of(model: Any, name: str) -> Tensor:
    weight: Tensor = model.get_submodule(name).weight
    return weight


def _decoder_layers(model: Any, body: str, kind: str) -> nn.ModuleList:
    """The body's list of decoder layers. Raises ModelUnsupported if it is not clear which one that is.

    Of the lists that are in no other one: the only one, or the only one of as many modules as there are layers.
    """
    lists = {
        name: module for name, module in model.get_submodule(body).named_modules() if isinstance(module, nn.ModuleList)
    }
    outer = [each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    count = model.config.get_text_config().num_hidden_layers
    found = outer if len(outer) == 1 else [each for each in outer if len(each) == count]
    if len(found) != 1:
        raise ModelUnsupported(f"a {kind} base cannot be trained: it has no single list of {count} decoder layers")
    return found[0]


@contextmanager
def _training_refused(kind: str) -> Iterator[None]:
    """Say of a refusal that it is about training."""
    try:
        yield
    except ModelUnsupported as error:
        raise ModelUnsupported(f"a {kind} base cannot be trained: {error.message}") from error
