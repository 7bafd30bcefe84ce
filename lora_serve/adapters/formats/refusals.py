"""PEFT methods and options that are not supported: the reason, and what to do instead.

Every PEFT method is either in `dispatch.FORMATS` or here, as is every LoRA option that changes the result and cannot be
lowered. The calls in the advice are PEFT's (0.21), and tests run them. Source of the reasons: `peft/tuners/*/layer.py`
and `model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_serve.errors import AdapterInvalid

MODEL = "PeftModel.from_pretrained(base, adapter)"
MERGE = f'merge it, {MODEL}.merge_and_unload().save_pretrained("merged"), and serve that folder as a model of its own'
APPROXIMATE = (
    f'make a LoRA that comes close, peft.save_as_lora("lora", {MODEL}, rank=64), closer with a higher rank, '
    'or merge it with merge_and_unload().save_pretrained("merged") and serve that folder as a model of its own'
)
TRAIN = "PEFT cannot merge it: train a LoRA on the same data"
CONVERT = (
    'convert it with PEFT: model.save_pretrained("init") right after get_peft_model(...), and after training '
    'model.save_pretrained("lora", path_initial_model_for_weight_conversion="init"); '
    "upload that folder, a plain LoRA of twice the rank"
)


def _lossless(rank: str) -> str:
    """Advice to convert to LoRA without loss; `rank` is a formula over the adapter's configuration."""
    return (
        f'make a LoRA of it, which loses nothing: peft.save_as_lora("lora", {MODEL}, rank={rank}) with the numbers of '
        "adapter_config.json, and upload that folder"
    )


@dataclass(frozen=True)
class Refusal:
    """An unsupported method or option.

    Attributes:
        name: its common name.
        reason: why it cannot be lowered.
        advice: what to do instead.
    """

    name: str
    reason: str
    advice: str

    def error(self, wording: str) -> AdapterInvalid:
        """The error for an adapter; `wording` is how its configuration names the method or option."""
        return AdapterInvalid(f"{self.name} ({wording}) is not served: {self.reason}. Instead: {self.advice}.")


METHODS: Mapping[str, Refusal] = {
    # Updates as large as the weights themselves.
    "OFT": Refusal("OFT", "it rotates each module's input, W·R, which changes all of W at full rank", MERGE),
    "BOFT": Refusal("BOFT", "it rotates each module by butterfly factors, which changes all of W at full rank", MERGE),
    "HRA": Refusal("HRA", "it multiplies the base's weights by reflections, W·H₁…Hᵣ", MERGE),
    "ROAD": Refusal("RoAd", "it rotates pairs of output channels, and a gain per channel cannot mix channels", MERGE),
    "HIRA": Refusal("HiRA", "it multiplies W entry by entry with a low-rank matrix, which is of full rank", MERGE),
    "GLORA": Refusal("GLoRA", "it multiplies W entry by entry, which is of full rank", MERGE),
    "FROD": Refusal("FRoD", "it puts a factorisation of its own in place of every weight matrix", MERGE),
    "PEANUT": Refusal("PEANuT", "its change is a small neural network's answer to the base's weights", MERGE),
    "SHIRA": Refusal("SHiRA", "it changes single entries all over W: sparse, but of full rank", MERGE),
    "SUPERTUNING": Refusal("Super-Tuning", "it changes single entries all over W: sparse, but of full rank", MERGE),
    "FOURIERFT": Refusal("FourierFT", "its change is a dense matrix, made of Fourier coefficients", APPROXIMATE),
    "WAVEFT": Refusal("WaveFT", "its change is a dense matrix, made of wavelet coefficients", APPROXIMATE),
    "C3A": Refusal("C³A", "its change is a block-circulant matrix, of full rank", APPROXIMATE),
    # Low-rank, but in a form that no format here reads.
    "GRALORA": Refusal("GraLoRA", "it has factors per block of W", _lossless("r * gralora_k + hybrid_r")),
    "UNILORA": Refusal("Uni-LoRA", "its factors are looked up in one vector that all modules share", _lossless("r")),
    "TINYLORA": Refusal("TinyLoRA", "its factors come from an SVD of the base's weights", _lossless("r")),
    "PSOFT": Refusal("PSOFT", "it rotates within the base's largest singular directions", _lossless("r")),
    "ADAMSS": Refusal("AdaMSS", "it works in clusters of the base's singular directions", MERGE),
    "OSF": Refusal("OSF", "it trains the lower singular directions of W, usually half of them", MERGE),
    "DEFT": Refusal("DEFT", "it projects directions out of the base's weights before it adds its own", MERGE),
    "PVERA": Refusal("PVeRA", "it keeps a mean and a variance of every delta, and may sample at inference", MERGE),
    "BEFT": Refusal(
        "BEFT",
        "it adds a bias to modules, in keys that no format here reads",
        f"where those modules have a bias in the base, {MERGE}; else train with LoRA's lora_bias=True",
    ),
    # Not updates of weights.
    "LILY": Refusal("Lily", "it mixes its factors by an average over all tokens of a batch, strangers' too", TRAIN),
    "POLY": Refusal("Poly", "it mixes its factors by a task id, which a request here does not have", TRAIN),
    "SHADOW": Refusal("ShadowPEFT", "it runs a second network beside the base's layers", TRAIN),
    "ADAPTION_PROMPT": Refusal("Adaption prompt", "it adds gated prompts of its own inside attention", TRAIN),
    "XLORA": Refusal(
        "X-LoRA",
        "a classifier weighs its LoRAs anew for every token, after a forward pass without them",
        "upload its LoRAs one by one and weigh them in the request, adapter: [{name, weight}, …]",
    ),
    "BONE": Refusal(
        "Bone",
        "PEFT itself no longer reads it",
        "make a MiSS adapter of it with PEFT's scripts/convert-bone-to-miss.py",
    ),
}

SERVED_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
_CANNOT_REPEAT = "it takes a part out of the base's weights that the adapter's files do not tell: "
INITIALISATIONS: Mapping[str, Refusal] = {
    "corda": Refusal("CorDA", f"{_CANNOT_REPEAT}it depends on the covariance of training data", CONVERT),
    "lora_ga": Refusal("LoRA-GA", f"{_CANNOT_REPEAT}it depends on gradients of training data", CONVERT),
    "pissa_niter": Refusal("PiSSA by fast SVD", f"{_CANNOT_REPEAT}it depends on random numbers", CONVERT),
    "loftq": Refusal(
        "LoftQ",
        "it belongs to a base whose weights it quantised",
        'save that base from the trained model, model.unload().save_pretrained("base"), serve it, and put true for '
        'init_lora_weights in adapter_config.json; or model.save_pretrained("lora", '
        'path_initial_model_for_weight_conversion="init"), "init" being saved right after get_peft_model(...), '
        "which leaves out only what LoftQ's quantisation lost",
    ),
}

# LoRA options that are refused when set.
FIELDS: Mapping[str, Refusal] = {
    "layer_replication": Refusal("Layer replication", "it builds a deeper model than the base", MERGE),
    "arrow_config": Refusal(
        "Arrow",
        "it chooses among several LoRAs anew for every token",
        "upload the LoRAs one by one and weigh them in the request, adapter: [{name, weight}, …]",
    ),
    "megatron_config": Refusal(
        "Megatron",
        "it is for layers of Megatron, which are split over devices in an order of their own",
        "load it into the Hugging Face model that the checkpoint was converted to, and save it from there",
    ),
    "use_qalora": Refusal(
        "QA-LoRA", "it averages groups of a GPTQ base's inputs before A", "train without use_qalora, on the same base"
    ),
}

# Classes of modules that PEFT can put a LoRA on, but not this server.
MODULES: Mapping[str, str] = {
    "Conv1d": "a convolution; only linear modules and embeddings get deltas",
    "Conv2d": "a convolution; only linear modules and embeddings get deltas",
    "Conv3d": "a convolution; only linear modules and embeddings get deltas",
    "MultiheadAttention": "torch's fused attention, whose projections are no modules that could get deltas",
}


# Beginnings of keys, or parts of them, that other tools write.
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
_KOHYA_MATRICES = (".lora_down.", ".lora_up.")
_DIFFUSERS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")


def refuse_other_tools(keys: Iterable[str]) -> None:
    """Raise AdapterInvalid if keys are those of a tool other than PEFT, saying which and what to do."""
    for key in keys:
        shown = f"its keys ({key[:60]}) are"
        if key.startswith(_KOHYA):
            raise AdapterInvalid(
                f"{shown} those of kohya's sd-scripts: a LoRA of an image model, not of a language model"
            )
        if any(part in key for part in _KOHYA_MATRICES):
            raise AdapterInvalid(
                f"{shown} in kohya's form, not in PEFT's. Instead: rename them to PEFT's, "
                "base_model.model.<module>.lora_A.weight for lora_down and lora_B for lora_up, and put what its alpha "
                "tensors hold into adapter_config.json as lora_alpha"
            )
        if key.startswith(_DIFFUSERS) and "lora" in key:
            raise AdapterInvalid(f"{shown} those of diffusers: a LoRA of an image model, not of a language model")


def refuse_known_method(peft_type: object) -> None:
    """Raise AdapterInvalid for a method that is known and not supported."""
    known = METHODS.get(peft_type.upper()) if isinstance(peft_type, str) else None
    if known is not None:
        raise known.error(f"peft_type {str(peft_type)[:40]}")


def refuse_method(peft_type: str, served: Mapping[str, object]) -> AdapterInvalid:
    """The error for a method that no format reads."""
    refuse_known_method(peft_type)
    wording = f"peft_type {peft_type[:40]}"
    return AdapterInvalid(f"{wording} is no method that is known here; served are: {', '.join(sorted(served))}")


def refuse_initialisation(value: Any) -> None:
    """Raise AdapterInvalid for a value of `init_lora_weights` that is unsupported or unknown."""
    if value is None or isinstance(value, bool):
        return
    wording = f"init_lora_weights = {str(value)[:40]!r}"
    name = value.lower() if isinstance(value, str) else ""
    refused = INITIALISATIONS.get("pissa_niter" if name.startswith("pissa_niter") else name)
    if refused is not None:
        raise refused.error(wording)
    if name not in SERVED_INITIALISATIONS:
        raise AdapterInvalid(f"{wording} is no initialisation that is known here; it may change the base's own weights")


def refuse_fields(config: Mapping[str, Any]) -> None:
    """Raise AdapterInvalid for a LoRA option that is set and unsupported."""
    for field, refusal in FIELDS.items():
        if config.get(field):
            raise refusal.error(f"{field} in adapter_config.json")
