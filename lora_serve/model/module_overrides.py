"""Module overrides: what adapters do besides LoRA (replaced parameters, gains, biases, embedding deltas, token rows).

A batch with such adapters gets forward hooks on just the modules concerned, for one forward pass; each hook corrects
the adapter's rows after the module and its deltas computed the whole batch. Other batches run none of this code. The
formula is in `adapters.adapter.ModuleOverride`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.experts import AdaptedExperts
from lora_serve.model.external_linear import ExternalLinear
from lora_serve.model.linear import AdaptedLinear
from lora_serve.model.observe import rows_of, tensors_of
from lora_serve.model.packed_experts import PackedExperts
from lora_serve.model.packed_linear import PackedEmbedding, PackedLinear
from lora_serve.model.shape import base_module


@dataclass(frozen=True)
class RowOverride:
    """Rows of the batch, and an adapter's override for them at one module."""

    rows: AdapterRows
    override: ModuleOverride


class ModuleOverrides:
    """The module overrides of the adapters on the device, and how a forward pass applies them.

    Args:
        model: the base, with adapters installed.
        slots: overrides by slot and module; the device slots keep it up to date.
        head_sees_logits_rows: whether the head gets only the rows whose logits are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: BaseShape,
        slots: Mapping[int, Mapping[str, ModuleOverride]],
        *,
        head_sees_logits_rows: bool,
    ) -> None:
        self._model = model
        self._shape = shape
        self._slots = slots
        self._head_sees_logits_rows = head_sees_logits_rows

    def for_batch(self, batch: Batch) -> dict[str, list[RowOverride]]:
        """The overrides that apply to a batch, by module; empty for most batches."""
        found: dict[str, list[RowOverride]] = {}
        if not self._slots:
            return found
        for ranges, at_head in ((batch.adapter_rows, False), (batch.logits_adapter_rows, True)):
            for rows in ranges:
                for module, override in self._slots.get(rows.slot, {}).items():
                    if (module == self._shape.head and self._head_sees_logits_rows) == at_head:
                        found.setdefault(module, []).append(RowOverride(rows, override))
        return found

    @contextmanager
    def apply(self, overrides: Mapping[str, list[RowOverride]], batch: Batch) -> Iterator[None]:
        """Apply overrides to the forward pass in this context; `overrides` as returned by `for_batch`."""
        hooks = []
        try:
            for name, parts in overrides.items():
                module = self._model.get_submodule(name)
                is_embedding = name in self._shape.embeddings
                head = name == self._shape.head
                rows = batch.logits_rows if head and self._head_sees_logits_rows else batch.token_ids
                hook = _OverrideHook(
                    base_module(self._model, name),
                    parts,
                    _Layout(len(rows), heads_first=name in self._shape.heads_first),
                    is_embedding=is_embedding,
                    is_head=head,
                )
                if is_embedding:
                    hook.limit = self._ids(name)
                    hooks.append(module.register_forward_pre_hook(hook.before))
                hooks.append(module.register_forward_hook(hook.after))
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def mask_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """Set logits of tokens that are not in a row's vocabulary to -inf.

        Only needed if an adapter replaced the head by one of another size: then `logits` has as many columns as the
        largest vocabulary in the batch.
        """
        own, base = {}, self._ids(self._shape.head)
        for rows in batch.logits_adapter_rows:
            weight = _head_weight(self._slots.get(rows.slot, {}).get(self._shape.head))
            if weight is not None and weight.shape[0] != base:
                own[rows] = weight.shape[0]
        if not own:
            return logits
        logits = logits.clone()
        limit = torch.full((logits.shape[0],), base, device=logits.device)
        for rows, ids in own.items():
            limit[rows.start : rows.end] = ids
        return logits.masked_fill_(torch.arange(logits.shape[1], device=logits.device) >= limit[:, None], -torch.inf)

    def _ids(self, module: str) -> int:
        return self._shape.modules[module]["weight"][0]


@dataclass(frozen=True)
class _Layout:
    """Where the rows of a batch are in a module's tensors: [tokens, ...], [1, tokens, ...], or [1, heads, tokens, ...].

    Attributes:
        tokens: number of rows that the module gets.
    """

    tokens: int
    heads_first: bool

    def part(self, value: Any, rows: AdapterRows) -> Any:
        """A view of these rows of a tensor that has all rows of the batch; other values are returned unchanged."""
        if not isinstance(value, Tensor):
            return value
        if self.heads_first:
            return value[:, :, rows.start : rows.end] if value.ndim > 3 and value.shape[2] == self.tokens else value
        whole = rows_of(value, self.tokens)
        return value if whole is None else whole[rows.start : rows.end]


class _OverrideHook:
    """Forward hooks of one module that apply overrides to their rows.

    Attributes:
        limit: for an embedding, the size of its table.

    Args:
        module: the base's own module.
        layout: of the module's inputs and outputs.
        is_embedding: its input is token ids.
        is_head: its output is logits, padded to the largest vocabulary in the batch.
    """

    def __init__(
        self, module: nn.Module, parts: Sequence[RowOverride], layout: _Layout, *, is_embedding: bool, is_head: bool
    ) -> None:
        self._module, self._parts, self._layout = module, parts, layout
        self._is_embedding, self._is_head = is_embedding, is_head
        self._scaled = [part for part in parts if part.override.gain_out is not None or part.override.shift is not None]
        self._ids: Tensor | None = None
        self.limit = 0

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Clamp token ids beyond the base's table, which are in an adapter's own table only."""
        self._ids = args[0]
        return (args[0].clamp(max=self.limit - 1), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Correct the adapters' rows of the module's output, in place or in a padded copy."""
        inputs = args if self._ids is None else (self._ids, *args[1:])
        x, layout = inputs[0], self._layout
        if self._is_head:
            output = _pad_vocabulary(output, self._parts)
        for part in self._parts:
            if part.override.parameters or part.override.gain_in is not None:
                complete = module.complete if isinstance(module, AdaptedLinear | AdaptedExperts) else None
                _recompute(self._module, part, inputs, output, layout, complete)
            if part.override.lookup is not None:
                ids, y = layout.part(x, part.rows), layout.part(output, part.rows)
                y += part.rows.weight * (part.override.lookup.a[ids] @ part.override.lookup.b)
        if self._scaled:
            _scale(self._scaled, output, layout)
        for part in self._parts:
            if part.override.token_rows is not None:
                rows, y = layout.part(x, part.rows), layout.part(output, part.rows)
                _replace_tokens(part, rows, y, is_embedding=self._is_embedding)
        return output


def _recompute(
    module: nn.Module,
    part: RowOverride,
    inputs: tuple[Any, ...],
    output: Any,
    layout: _Layout,
    complete: Callable[[Tensor], Tensor] | None,
) -> None:
    """Recompute a part's rows of `output` with the adapter's input gain and parameters.

    Args:
        complete: of a linear module or of experts; see `AdaptedLinear.complete`.
    """
    args = [layout.part(value, part.rows) for value in inputs]
    if part.override.gain_in is not None:
        args[0] = (args[0].float() * part.override.gain_in).to(args[0].dtype)
    if isinstance(module, PackedLinear | PackedEmbedding | ExternalLinear):
        fresh = module.with_parameters(args[0], part.override.parameters)
        fresh = fresh if complete is None else complete(fresh)
    elif isinstance(module, PackedExperts):
        fresh = module.with_parameters(args[0], args[1], args[2], part.override.parameters)
        fresh = fresh if complete is None else complete(fresh)
    else:
        fresh = _with_parameters(module, part.override.parameters).forward(*args)  # its hooks are for the whole batch
        fresh = fresh if complete is None else complete(fresh)  # of one that is not packed
    for whole, tensor in zip(tensors_of(output), tensors_of(fresh), strict=True):
        layout.part(whole, part.rows)[..., : tensor.shape[-1]] = tensor


def _with_parameters(module: nn.Module, others: Mapping[str, Tensor]) -> nn.Module:
    """The module with other parameters: a shallow copy, since threads that load adapters read the module's own.

    As torch's `functional_call`, at a fraction of its cost.
    """
    copy = object.__new__(type(module))
    copy.__dict__ = module.__dict__ | {"_parameters": {**module._parameters, **others}}
    return copy


def _scale(parts: Sequence[RowOverride], output: Tensor, layout: _Layout) -> None:
    """Apply the output gains and shifts of all parts, in float32, by one call for all gains and one for all shifts."""
    exact = output.float()
    gains = [(part.rows, gain) for part in parts if (gain := part.override.gain_out) is not None]
    shifts = [(part.rows, shift) for part in parts if (shift := part.override.shift) is not None]
    if gains:
        torch._foreach_mul_([layout.part(exact, rows) for rows, _ in gains], [gain for _, gain in gains])
    if shifts:
        constants = [shift if rows.weight == 1 else rows.weight * shift for rows, shift in shifts]
        torch._foreach_add_([layout.part(exact, rows) for rows, _ in shifts], constants)
    if exact is not output:
        output.copy_(exact)


def _replace_tokens(part: RowOverride, x: Tensor, y: Tensor, *, is_embedding: bool) -> None:
    """Replace the embeddings, or the logits, of the token ids for which an adapter has its own rows."""
    rows, ids = part.override.token_rows, to_device(part.override.token_ids, torch.int64, y.device)
    assert rows is not None
    if is_embedding:
        hits = x[:, None] == ids  # [rows, ids]
        y.copy_(torch.where(hits.any(1, keepdim=True), rows[hits.int().argmax(1)], y))
    else:
        y[:, ids] = nn.functional.linear(x, rows)


def _head_weight(override: ModuleOverride | None) -> Tensor | None:
    return None if override is None else override.parameters.get("weight")


def _pad_vocabulary(output: Tensor, parts: Sequence[RowOverride]) -> Tensor:
    """Pad logits to the largest vocabulary of the parts; `mask_logits` masks what a row does not have."""
    weights = [weight for part in parts if (weight := _head_weight(part.override)) is not None]
    more = max((weight.shape[0] for weight in weights), default=0) - output.shape[-1]
    return nn.functional.pad(output, (0, more)) if more > 0 else output
