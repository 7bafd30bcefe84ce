"""One sequence's part of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's part of a step: its tokens `start` to `end` are computed.

    `samples`: whether its next token is sampled, because this part includes the last of its tokens, and it generates.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        samples = self.end == len(self.seq.tokens) and self.seq.pooling is None  # fixed now: the tokens grow later
        object.__setattr__(self, "samples", samples)

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def decodes(self) -> bool:
        """Whether it is one token after the prompt, and not the rest of a prompt."""
        return self.count == 1 and self.start >= self.seq.prompt_end

    @property
    def awaits_token(self) -> bool:
        """Whether its next token is still to be sampled: a grammar may have forced it since the launch."""
        tokens = self.seq.tokens
        return self.samples and (len(tokens) == self.end or tokens[self.end] == IN_FLIGHT_TOKEN)
