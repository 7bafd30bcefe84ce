"""Messages about training runs: operations of the engine's trainer, which the API process calls, and their answers.

A training run is one adapter that is trained on the resident base. Operations on one run are carried out one after
another in the order in which they were sent, those on different runs beside each other, between the steps that serve.
The engine keeps runs in memory only: if it dies, they are gone, and whoever drives them goes on from what was saved.
"""

from __future__ import annotations

import msgspec


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter of a run, in PEFT's words and with PEFT's meaning (`LoraConfig`, `IA3Config`, …).

    Attributes:
        peft_type: "LORA", "IA3", "PROMPT_TUNING", "P_TUNING" or "PREFIX_TUNING"; fields of another method keep
            their defaults.
        init_lora_weights: "default", "gaussian", "orthogonal", "pissa", "pissa_niter_4" or "olora".
        train_lm_head: adapt the LM head beside `target_modules`, of which "all-linear" is all others.
        feedforward_modules: IA3's modules whose input is multiplied, by the end of their names.
        num_virtual_tokens: of prompt, P- and prefix tuning.
        prompt_tuning_init: "RANDOM" or "SAMPLE_VOCAB".
        encoder_reparameterization_type: of P-tuning, "MLP" or "LSTM".
        encoder_hidden_size: of P-tuning's encoder or the projection; 0: the base's width.
        encoder_num_layers: of P-tuning's LSTM.
        encoder_dropout: 0.
        prefix_projection: prefix tuning with a projection.
    """

    peft_type: str = "LORA"
    r: int = 16
    lora_alpha: float = 32
    target_modules: str | list[str] = "all-linear"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: str = "default"
    train_lm_head: bool = False
    feedforward_modules: str | list[str] = []
    num_virtual_tokens: int = 0
    prompt_tuning_init: str = "RANDOM"
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int = 0
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    prefix_projection: bool = False
    seed: int = 0


class TrainingExample(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to learn from.

    Attributes:
        tokens, targets: [n], and for each token the one that should follow it.
        inputs: by name what the loss reads for each target, [n] each: `weights`, `logprobs`, `advantages`.
    """

    tokens: list[int]
    targets: list[int]
    inputs: dict[str, list[float]]


class CreateRun(msgspec.Struct, frozen=True, tag="create_run"):
    """Begin to train a new adapter. Answered with a `RunInfo`.

    Attributes:
        owner: whose run it is; owners share the trainer's time equally.
        priority: runs of a higher one go first.
    """

    run: str
    settings: RunSettings
    owner: str = ""
    priority: int = 0


class ForwardBackward(msgspec.Struct, frozen=True, tag="forward_backward"):
    """Add the gradients of a loss, summed over the examples, to those of the run. Answered with a `PassResult`.

    Attributes:
        loss: name of the loss function; `config` has its numbers.
        forward_only: compute the loss and leave the gradients alone.
        all_logprobs: compute log-probabilities of the targets that have no part in the loss as well; that costs as
            much as their part would.
    """

    run: str
    examples: list[TrainingExample]
    loss: str = "cross_entropy"
    config: dict[str, float] = {}
    forward_only: bool = False
    all_logprobs: bool = False


class OptimizerStep(msgspec.Struct, frozen=True, tag="optimizer_step"):
    """Apply and clear the gradients with AdamW. Answered with a `StepResult`."""

    run: str
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class SaveRun(msgspec.Struct, frozen=True, tag="save_run"):
    """Write weights, settings and the optimizer's state to a new folder. Answered with None once it is on the disk."""

    run: str
    folder: str


class RestoreRun(msgspec.Struct, frozen=True, tag="restore_run"):
    """Restore the weights that `SaveRun` wrote, and with `optimizer` its state. Answered with a `RunInfo`."""

    run: str
    folder: str
    optimizer: bool = True


class ExportRun(msgspec.Struct, frozen=True, tag="export_run"):
    """Write the adapter's PEFT files to a new folder. Answered with None once they are on the disk, if `durable`."""

    run: str
    folder: str
    durable: bool = True


class PublishRun(msgspec.Struct, frozen=True, tag="publish_run"):
    """Publish the adapter as it is now under a new name of the adapter store. Answered with an `AdapterInfo`.

    Attributes:
        durable: wait until it is on the disk; without, it survives the end of processes, and not that of the machine.
    """

    run: str
    name: str
    durable: bool = True


class CloseRun(msgspec.Struct, frozen=True, tag="close_run"):
    """End a run, if there is one, and free its memory; what it has not finished fails. Answered with None."""

    run: str


RunOperation = CreateRun | ForwardBackward | OptimizerStep | SaveRun | RestoreRun | ExportRun | CloseRun


class RunInfo(msgspec.Struct, frozen=True):
    """A run: number of trained parameters, bytes of memory it takes, steps of its optimizer so far."""

    run: str
    parameters: int
    memory_bytes: int
    steps: int


class PassResult(msgspec.Struct, frozen=True):
    """What a pass found.

    Attributes:
        loss: summed over the examples; not finite if it diverged.
        logprobs: of each example's targets; 0 where a target has no part in the loss, unless all were asked for.
        metrics: what else the loss function computes, by name.
        tokens: computed.
        hits: targets with a part in the loss that no other token has a higher logit than.
    """

    loss: float
    logprobs: list[list[float]]
    metrics: dict[str, float]
    tokens: int
    hits: int = 0


class StepResult(msgspec.Struct, frozen=True):
    """What an optimizer's step did: the gradients' norm before clipping, and the number of steps so far."""

    grad_norm: float
    steps: int
