"""Encoders of virtual tokens: what PEFT trains instead of the table of embeddings, or of keys and values, itself.

    P-tuning, MLP       W₃ relu(W₂ relu(W₁ E))               Liu et al. 2021, as in PEFT's `PromptEncoder`
    P-tuning, LSTM      W₂ relu(W₁ LSTM(E))                  the LSTM goes both ways
    prefix projection   W₂ tanh(W₁ E)                        Li, Liang 2021, as in PEFT's `PrefixEncoder`

E [tokens, token_dim] is an embedding, each W with a bias. Only the output is saved and served. Names of parameters are
PEFT's, and so are the distributions that they begin with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

EMBEDDING = "embedding.weight"
_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_GATES = 4  # of an LSTM's cell
_CELL_SAVED = 28  # numbers that a cell saves for its gradients, with these, by its width; measured, as are those below
_LAYER_WEIGHTS = 4  # copies of the weights of a cell while its gradients are computed
_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True)
class TableEncoder:
    """An embedding, an LSTM if there is one, and linear modules with an activation between them.

    Attributes:
        head: PEFT's name of the linear modules.
        widths: what the first linear module reads, and what each has as outputs.
        lstm_layers: 0: none. Each of both directions has half of the first width.
    """

    tokens: int
    token_dim: int
    head: Literal["mlp_head", "transform"]
    widths: tuple[int, ...]
    activation: Literal["relu", "tanh"]
    lstm_layers: int = 0

    @classmethod
    def mlp(cls, tokens: int, token_dim: int, hidden: int) -> TableEncoder:
        """P-tuning's of three linear modules."""
        return cls(tokens, token_dim, "mlp_head", (token_dim, hidden, hidden, token_dim), "relu")

    @classmethod
    def lstm(cls, tokens: int, token_dim: int, hidden: int, layers: int) -> TableEncoder:
        """P-tuning's with an LSTM of both directions."""
        return cls(tokens, token_dim, "mlp_head", (2 * hidden, 2 * hidden, token_dim), "relu", layers)

    @classmethod
    def projection(cls, tokens: int, token_dim: int, hidden: int, outputs: int) -> TableEncoder:
        """Prefix tuning's."""
        return cls(tokens, token_dim, "transform", (token_dim, hidden, outputs), "tanh")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, in PEFT's order."""
        found: dict[str, tuple[int, ...]] = {EMBEDDING: (self.tokens, self.token_dim)}
        for names, inputs in self._cells():
            rows, hidden = _GATES * self._lstm_hidden, self._lstm_hidden
            found |= dict(zip(names, ((rows, inputs), (rows, hidden), (rows,), (rows,)), strict=True))
        for index, (inputs, outputs) in enumerate(pairwise(self.widths)):
            found[f"{self.head}.{2 * index}.weight"] = (outputs, inputs)
            found[f"{self.head}.{2 * index}.bias"] = (outputs,)
        return found

    @property
    def size(self) -> int:
        """Number of its parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def work(self) -> int:
        """Multiplications of computing the table, about."""
        return self.tokens * self.size

    @property
    def working(self) -> int:
        """Numbers that computing the gradients takes beside the parameters and their gradients, at most.

        What the modules save and the gradients of it; the gradient of a parameter before it is added.
        """
        cells = 2 * self.lstm_layers * _CELL_SAVED * self._lstm_hidden
        activations = 2 * (self.token_dim + sum(self.widths))
        weights = [
            _LAYER_WEIGHTS * _GATES * self._lstm_hidden * (inputs + self._lstm_hidden) for _, inputs in self._cells()
        ]
        return self.tokens * (cells + activations) + max(*weights, *map(math.prod, self.shapes.values()))

    def initial(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """What each parameter begins with, on the host."""
        for name, shape in self.shapes.items():
            if name == EMBEDDING:
                yield name, torch.randn(shape, generator=generator)
                continue
            linear = name.startswith(self.head)
            inputs = self.widths[int(name.split(".")[1]) // 2] if linear else self._lstm_hidden
            bound = 1 / math.sqrt(inputs)
            yield name, nn.init.uniform_(torch.empty(shape), -bound, bound, generator=generator)

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The table [tokens, outputs] of its parameters, by name."""
        found = parameters[EMBEDDING]
        if self.lstm_layers:
            found = self._lstm(found, [parameters[name] for names, _ in self._cells() for name in names])
        last = len(self.widths) - 2
        for index in range(last + 1):
            weight, bias = (parameters[f"{self.head}.{2 * index}.{kind}"] for kind in ("weight", "bias"))
            found = functional.linear(found, weight, bias)
            if index < last:
                found = _ACTIVATIONS[self.activation](found)
        return found

    @property
    def _lstm_hidden(self) -> int:
        return self.widths[0] // 2

    def _cells(self) -> Iterator[tuple[list[str], int]]:
        """Names of the parameters of each layer and direction of the LSTM, and what it reads."""
        for layer in range(self.lstm_layers):
            for direction in ("", "_reverse"):
                names = [f"lstm_head.{kind}_l{layer}{direction}" for kind in _CELL]
                yield names, 2 * self._lstm_hidden if layer else self.token_dim

    def _lstm(self, embedded: Tensor, weights: list[Tensor]) -> Tensor:
        """The LSTM's outputs [tokens, 2 · hidden]."""
        state = embedded.new_zeros(2 * self.lstm_layers, 1, self._lstm_hidden)
        with torch.backends.cudnn.flags(enabled=False):  # its sums have no fixed order, and weights must be one block
            outputs: Tensor = torch.lstm(
                embedded[None], (state, state), weights, True, self.lstm_layers, 0.0, False, True, True
            )[0]
        return outputs[0]
