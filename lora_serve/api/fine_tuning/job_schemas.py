"""The body of `POST /v1/fine_tuning/jobs`: OpenAI's fields, and this server's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lora_serve.api.fine_tuning.job_records import Hyperparameters, TrainerSettings
from lora_serve.api.fine_tuning.peft_options import BEGIN_AS_THE_BASE, LoraOptions, PeftOptions
from lora_serve.api.openai.schemas import Few, Strict
from lora_serve.names import NAME_PATTERN
from lora_serve.training_messages import RunSettings

MOST_EPOCHS, MOST_BATCH, LARGEST_MULTIPLIER = 1000, 4096, 1000.0

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=MOST_EPOCHS)] | Auto | None
BatchSize = Annotated[int, Field(ge=1, le=MOST_BATCH)] | Auto | None
Multiplier = Annotated[float, Field(gt=0, le=LARGEST_MULTIPLIER)] | Auto | None
Beta = Annotated[float, Field(gt=0, le=100)] | Auto | None


class SupervisedHyperparameters(Strict):
    """How often, how much at a time and how fast; "auto" lets the server choose."""

    n_epochs: Epochs = None
    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None


class PreferenceHyperparameters(SupervisedHyperparameters):
    """The same, and how near the model stays to the base."""

    beta: Beta = None


class SupervisedMethod(Strict):
    hyperparameters: SupervisedHyperparameters | None = None


class PreferenceMethod(Strict):
    hyperparameters: PreferenceHyperparameters | None = None


class MethodChoice(Strict):
    """How to learn: from replies (`supervised`), or from preferences between two (`dpo`)."""

    type: Literal["supervised", "dpo"]
    supervised: SupervisedMethod | None = None
    dpo: PreferenceMethod | None = None

    @model_validator(mode="before")
    @classmethod
    def _reinforcement_is_not_served(cls, value: Any) -> Any:
        if isinstance(value, dict) and (value.get("type") == "reinforcement" or value.get("reinforcement") is not None):
            raise ValueError("reinforcement fine-tuning with graders is not supported; supervised and dpo are")
        return value

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> MethodChoice:
        other = self.dpo if self.type == "supervised" else self.supervised
        if other is not None:
            raise ValueError(f"type is {self.type}, so that the settings must be in {self.type}")
        return self


class TrainerOptions(Strict):
    """How to train, in the words of transformers' `TrainingArguments`."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="instead of learning_rate_multiplier"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=1e6)] | None = Field(None, description="0: gradients are not scaled")
    early_stopping_patience: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] | None = Field(
        None, description="epochs in a row without a lower validation loss, after which training ends"
    )
    load_best_model_at_end: bool | None = Field(None, description="the result is the checkpoint of lowest valid_loss")


class CreateFineTuningJob(Strict):
    """A fine-tuning job."""

    model: Annotated[str, Field(min_length=1, max_length=200, description="the base")]
    training_file: Annotated[str, Field(min_length=1, max_length=100, description="id of a file of /v1/files")]
    validation_file: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = Field(None, description="part of the model's name")
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Few, Field(max_length=16)
        ]
        | None
    ) = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    method: MethodChoice | None = None
    hyperparameters: SupervisedHyperparameters | None = Field(None, description="the old place, without `method`")
    lora: LoraOptions | None = None
    peft: PeftOptions | None = Field(None, description="instead of `lora`: any method that is trained")
    trainer: TrainerOptions | None = None
    max_length: Annotated[int, Field(ge=2, le=1 << 24)] | None = Field(
        None, description="tokens of an example, beyond which its end is cut off (default: the base's context)"
    )
    adapter: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")] | None = Field(
        None, description="publish the result as a version of this adapter (default: a new name, like suffix)"
    )

    @field_validator("integrations", mode="before")
    @classmethod
    def _nothing_is_integrated(cls, value: Any) -> Any:
        if value:
            raise ValueError("integrations (wandb) are not supported; metrics are in the events and the results file")
        return value

    @field_validator("suffix")
    @classmethod
    def _suffix_can_be_shown(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("it has characters that cannot be printed")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> CreateFineTuningJob:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters: send them in method")
        if self.lora is not None and self.peft is not None:
            raise ValueError("lora, peft: send one of them")
        preferences = self.method is not None and self.method.type == "dpo"
        if preferences and self.peft is not None and not isinstance(self.peft, BEGIN_AS_THE_BASE):
            raise ValueError(
                f"peft: dpo learns against the base, as which an adapter begins; {self.peft.peft_type} begins otherwise"
            )
        trainer = self.trainer or TrainerOptions()
        validates = trainer.early_stopping_patience is not None or trainer.load_best_model_at_end
        if validates and self.validation_file is None:
            raise ValueError("trainer: early stopping and the best checkpoint need a validation_file")
        return self

    @property
    def chosen_hyperparameters(self) -> Hyperparameters:
        """What was asked for, with "auto" for what was not."""
        chosen: SupervisedHyperparameters | None = self.hyperparameters
        if self.method is not None:
            settings = self.method.supervised if self.method.type == "supervised" else self.method.dpo
            chosen = None if settings is None else settings.hyperparameters
        given = {} if chosen is None else chosen.model_dump(exclude_none=True)
        if self.method is not None and self.method.type == "dpo":
            given.setdefault("beta", "auto")
        return Hyperparameters(**given)

    @property
    def run_settings(self) -> RunSettings:
        """The adapter to train. Its first weights follow from the seed, which is given later."""
        given = self.lora or self.peft
        return RunSettings(**({} if given is None else given.model_dump(exclude_none=True)))

    @property
    def trainer_settings(self) -> TrainerSettings:
        return TrainerSettings(**({} if self.trainer is None else self.trainer.model_dump(exclude_none=True)))
