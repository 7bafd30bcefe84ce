"""What adapters do to modules besides the low-rank delta: replaced parameters, gains, constants, lookups, token rows.

A batch that holds such adapters gets forward hooks on just the modules that they change, for the time of its forward
pass; each hook treats the rows of each adapter after the module (and the deltas) computed the whole batch. Any other
batch runs none of this. The formula is in `adapters.adapter.ModuleOverride`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.model.batch import Batch, Run
from lora_serve.model.external_linear import ExternalLinear
from lora_serve.model.observe import rows_of, tensors_of
from lora_serve.model.packed_linear import PackedEmbedding, PackedLinear
from lora_serve.model.shape import base_of


@dataclass(frozen=True)
class Part:
    """Rows of the batch, and what is done to them at one module."""

    run: Run
    override: ModuleOverride


class ModuleOverrides:
    """The changes of a resident base.

    Args:
        model: the base, adapted modules in place.
        slots: changes by slot, then module; the bank keeps it up to date.
        head_rows: whether the head sees only the rows whose logits are wanted.
    """

    def __init__(
        self, model: nn.Module, shape: BaseShape, slots: Mapping[int, Mapping[str, ModuleOverride]], *, head_rows: bool
    ) -> None:
        self._model = model
        self._shape = shape
        self._slots = slots
        self._head_rows = head_rows

    def of(self, batch: Batch) -> dict[str, list[Part]]:
        """What the batch's rows need, by module; empty for most batches."""
        found: dict[str, list[Part]] = {}
        if not self._slots:
            return found
        for runs, at_head in ((batch.runs, False), (batch.logits_runs, True)):
            for run in runs:
                for module, override in self._slots.get(run.slot, {}).items():
                    if (module == self._shape.head and self._head_rows) == at_head:
                        found.setdefault(module, []).append(Part(run, override))
        return found

    @contextmanager
    def applied(self, parts: Mapping[str, list[Part]], batch: Batch) -> Iterator[None]:
        """Have the modules changed for the rows of `parts` meanwhile."""
        hooks = []
        try:
            for name, each in parts.items():
                module = self._model.get_submodule(name)
                looks_up = name in self._shape.embeddings
                head = name == self._shape.head
                seen = batch.logits_rows if head and self._head_rows else batch.token_ids
                hook = _Hook(base_of(self._model, name), each, len(seen), looks_up=looks_up, widens=head)
                if looks_up:
                    hook.limit = self._ids(name)
                    hooks.append(module.register_forward_pre_hook(hook.before))
                hooks.append(module.register_forward_hook(hook.after))
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def masked(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits with -inf for tokens that a row's vocabulary does not have.

        Only of interest where an adapter replaced the head by one of another size: then `logits` has as many columns as
        the largest vocabulary in the batch.
        """
        own, base = {}, self._ids(self._shape.head)
        for run in batch.logits_runs:
            weight = _head_weight(self._slots.get(run.slot, {}).get(self._shape.head))
            if weight is not None and weight.shape[0] != base:
                own[run] = weight.shape[0]
        if not own:
            return logits
        logits = logits.clone()
        limit = torch.full((logits.shape[0],), base, device=logits.device)
        for run, ids in own.items():
            limit[run.start : run.end] = ids
        return logits.masked_fill_(torch.arange(logits.shape[1], device=logits.device) >= limit[:, None], -torch.inf)

    def _ids(self, module: str) -> int:
        return self._shape.modules[module]["weight"][0]


class _Hook:
    """One module's part in a forward pass.

    Args:
        module: the base's own module, which computes with an adapter's parameters.
        tokens: rows that the module sees.
        looks_up: it gets ids; `widens`: it gives logits, of as many tokens as the largest vocabulary has.
    """

    def __init__(self, module: nn.Module, parts: Sequence[Part], tokens: int, *, looks_up: bool, widens: bool) -> None:
        self._module, self._parts, self._tokens = module, parts, tokens
        self._looks_up, self._widens = looks_up, widens
        self._scaled = [part for part in parts if part.override.gain_out is not None or part.override.shift is not None]
        self._ids: Tensor | None = None
        self.limit = 0

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let a lookup that knows `limit` ids pass over larger ones, which only an adapter's own table has."""
        self._ids = args[0]
        return (args[0].clamp(max=self.limit - 1), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Treat the adapters' rows."""
        inputs = args if self._ids is None else (self._ids, *args[1:])
        x, tokens = inputs[0], self._tokens
        if self._widens:
            output = _widened(output, self._parts)
        for part in self._parts:
            if part.override.parameters or part.override.gain_in is not None:
                _recompute(self._module, part, inputs, output, tokens)
            if part.override.lookup is not None:
                ids, y = _own(x, part, tokens), _own(output, part, tokens)
                y += part.run.weight * (part.override.lookup.a[ids] @ part.override.lookup.b)
        if self._scaled:
            _scale(self._scaled, output, tokens)
        for part in self._parts:
            if part.override.token_rows is not None:
                _replace_tokens(part, _own(x, part, tokens), _own(output, part, tokens), looks_up=self._looks_up)
        return output


def _own(value: Any, part: Part, tokens: int) -> Any:
    """The part's rows of a tensor that has the batch's; anything else as it is."""
    rows = rows_of(value, tokens) if isinstance(value, Tensor) else None
    return value if rows is None else rows[part.run.start : part.run.end]


def _recompute(module: nn.Module, part: Part, inputs: tuple[Any, ...], output: Any, tokens: int) -> None:
    """Rows of a module's output, with the adapter's input gain and parameters."""
    args = [_own(value, part, tokens) for value in inputs]
    if part.override.gain_in is not None:
        args[0] = (args[0].float() * part.override.gain_in).to(args[0].dtype)
    if isinstance(module, PackedLinear | PackedEmbedding | ExternalLinear):
        fresh = module.with_parameters(args[0], part.override.parameters)
    else:
        fresh = _with_parameters(module, part.override.parameters).forward(*args)  # its hooks are for the whole batch
    for whole, tensor in zip(tensors_of(output), tensors_of(fresh), strict=True):
        _own(whole, part, tokens)[..., : tensor.shape[-1]] = tensor


def _with_parameters(module: nn.Module, others: Mapping[str, Tensor]) -> nn.Module:
    """The module with other parameters: a shallow copy, since threads that load adapters read the module's own.

    As torch's `functional_call`, at a fraction of its cost.
    """
    copy = object.__new__(type(module))
    copy.__dict__ = module.__dict__ | {"_parameters": {**module._parameters, **others}}
    return copy


def _scale(parts: Sequence[Part], output: Tensor, tokens: int) -> None:
    """Gains and constants of all parts, in float32; one call for all rather than one each."""
    exact = output.float()
    rows = rows_of(exact, tokens)
    assert rows is not None
    gains = [(part.run, gain) for part in parts if (gain := part.override.gain_out) is not None]
    shifts = [(part.run, shift) for part in parts if (shift := part.override.shift) is not None]
    if gains:
        torch._foreach_mul_([rows[run.start : run.end] for run, _ in gains], [gain for _, gain in gains])
    if shifts:
        constants = [shift if run.weight == 1 else run.weight * shift for run, shift in shifts]
        torch._foreach_add_([rows[run.start : run.end] for run, _ in shifts], constants)
    if exact is not output:
        output.copy_(exact)


def _replace_tokens(part: Part, x: Tensor, y: Tensor, *, looks_up: bool) -> None:
    """Rows of an embedding whose id is one of the part's, or the logits of these ids."""
    rows, ids = part.override.token_rows, to_device(part.override.token_ids, torch.int64, y.device)
    assert rows is not None
    if looks_up:
        hits = x[:, None] == ids  # [rows, ids]
        y.copy_(torch.where(hits.any(1, keepdim=True), rows[hits.int().argmax(1)], y))
    else:
        y[:, ids] = nn.functional.linear(x, rows)


def _head_weight(override: ModuleOverride | None) -> Tensor | None:
    return None if override is None else override.parameters.get("weight")


def _widened(output: Tensor, parts: Sequence[Part]) -> Tensor:
    """Room for the logits of the largest vocabulary; what is beyond a row's own is masked in the end."""
    weights = [weight for part in parts if (weight := _head_weight(part.override)) is not None]
    more = max((weight.shape[0] for weight in weights), default=0) - output.shape[-1]
    return nn.functional.pad(output, (0, more)) if more > 0 else output
