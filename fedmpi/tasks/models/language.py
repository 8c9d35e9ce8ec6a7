"""Models of text through ``transformers`` (the extra ``hf``): by configuration, from a local folder or the hub.

Their input is int64 ``(B, L)`` with PAD after the end, from which they make the attention mask. Dropout is
off: its masks would be randomness outside :mod:`fedmpi.random`.

Shape suffixes: B samples, L tokens, E features, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fedmpi.errors import ConfigError
from fedmpi.tasks import Options
from fedmpi.tasks.dataset import PAD
from fedmpi.tasks.hf import library, loaded
from fedmpi.tasks.models.initial import ModelOptions


class LoraOptions(Options):
    """Low-rank adapters (Hu et al., "LoRA: low-rank adaptation of large language models", 2021): W + (alpha / rank)
    B A, of which A and B are trained, and travel. Means of A and of B are no mean of B A; with A frozen they are (Sun
    et al., "Improving LoRA in privacy-preserving federated learning", FFA-LoRA, 2024)."""

    rank: PositiveInt = Field(8, description="of B A")
    alpha: float = Field(16.0, gt=0, description="B A counts alpha / rank times")
    targets: list[str] | str = Field(
        "all-linear",
        min_length=1,
        description="ends of the names of the layers that get one; all-linear: every linear",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of what comes to A, in training")
    freeze_a: bool = Field(
        False, description="only B is trained and travels (FFA-LoRA): averaging is then exact"
    )


class TransformerOptions(ModelOptions):
    pretrained: str | None = Field(
        None,
        description="a folder as transformers saves it, a folder in the data folder (minilm) or a hub name; "
        "default: initial values",
    )
    settings: dict[str, int | float | str | bool] = Field(
        {}, description="fields of transformers' own configuration, e.g. hidden_size"
    )
    lora: LoraOptions | None = Field(
        None, description="only adapters are trained and travel, by PEFT: {rank: 8, targets: [query, value]}"
    )


class EncoderOptions(TransformerOptions):
    architecture: str = Field("bert", description="where nothing is pretrained: a model type of transformers")
    pool: Literal["mean", "first"] = Field("mean", description="what of the last layer the linear layer gets")
    train: Literal["all", "head"] = Field("all", description="the whole model, or only the linear layer")


class DecoderOptions(TransformerOptions):
    architecture: str = Field("gpt2", description="where nothing is pretrained: a model type of transformers")


class _Tokens(nn.Module):
    """What both kinds do with a batch of tokens."""

    def __init__(self, inner: nn.Module, positions: int, length: int, name: str) -> None:
        super().__init__()
        if length > positions:
            raise ConfigError(
                f"model {name}: it has {positions} positions, the data have {length} tokens a sample; expected at "
                f"most as many: set data.length to {positions} or less, or take a model with more positions"
            )
        self.inner = inner
        self.words = cast(Any, inner).get_input_embeddings().num_embeddings
        self.name = name

    def run(self, x_BL: Tensor, **more: Any) -> tuple[Any, Tensor]:
        """The inner model's output and the mask ``(B, L)``, cut to the longest of the batch."""
        mask_BL = x_BL != PAD
        longest = max(1, int(mask_BL.sum(1).max()))
        x_BL, mask_BL = x_BL[:, :longest], mask_BL[:, :longest]
        if int(x_BL.max()) >= self.words:
            raise ConfigError(
                f"model {self.name}: it has a vocabulary of {self.words}, the data have token {int(x_BL.max())}; "
                "give model and data the same pretrained name, or set settings.vocab_size"
            )
        return self.inner(input_ids=x_BL.clamp(min=0), attention_mask=mask_BL.long(), **more), mask_BL


class _Classifier(_Tokens):
    def __init__(self, inner: nn.Module, positions: int, length: int, classes: int, pool: str) -> None:
        super().__init__(inner, positions, length, "encoder")
        self.pool = pool
        self.out = nn.Linear(cast(Any, inner).config.hidden_size, classes)

    def forward(self, x_BL: Tensor) -> Tensor:
        output, mask_BL = self.run(x_BL)
        h_BLE = output.last_hidden_state
        if self.pool == "first":
            return cast(Tensor, self.out(h_BLE[:, 0]))
        weight_BL1 = mask_BL[..., None].to(h_BLE.dtype)
        return cast(Tensor, self.out((h_BLE * weight_BL1).sum(1) / weight_BL1.sum(1)))


class _LanguageModel(_Tokens):
    def forward(self, x_BL: Tensor) -> Tensor:
        return cast(Tensor, self.run(x_BL, use_cache=False)[0].logits)


def encoder(shape: tuple[int, ...], classes: int, options: EncoderOptions) -> nn.Module:
    """A sentence classifier: the encoder, its last layer pooled over the tokens, and a linear layer.

    Raises:
      ConfigError: transformers is not installed, the model is not found or does not fit the data.
    """
    inner, config = _inner("encoder", "AutoModel", shape, options)
    if hasattr(inner, "pooler"):
        inner.pooler = None  # BERT's own is not used, and would be sent
    model = _Classifier(inner, config.max_position_embeddings, shape[0], classes, options.pool)
    if options.train == "head":
        if options.lora is not None:
            raise ConfigError(
                "model encoder.lora: expected none with train: head, which trains no part of the encoder"
            )
        model.inner.requires_grad_(False)
    if options.lora is not None:
        model.inner = _adapted("encoder", inner, options.lora)
    return model


def decoder(shape: tuple[int, ...], classes: int, options: DecoderOptions) -> nn.Module:
    """A language model: logits ``(B, L, V)``; the loss is ``next_token``."""
    inner, config = _inner("decoder", "AutoModelForCausalLM", shape, options)
    model = _LanguageModel(inner, config.max_position_embeddings, shape[0], "decoder")
    if options.lora is not None:
        model.inner = _adapted("decoder", inner, options.lora)
    return model


def _adapted(name: str, inner: nn.Module, options: LoraOptions) -> nn.Module:
    """The model with adapters, which alone are trained."""
    peft = library("peft")
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=options.targets,
        lora_dropout=options.dropout,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in inner.modules()),  # GPT-2's
    )
    try:
        adapted: nn.Module = peft.get_peft_model(inner, config)
    except ValueError as error:
        layers = dict.fromkeys(
            n.rpartition(".")[2]
            for n, m in inner.named_modules()
            if isinstance(m, nn.Linear) or n.endswith("c_attn")
        )
        raise ConfigError(
            f"model {name}.lora.targets: expected ends of the names of its layers, {', '.join(layers)}, got "
            f"{options.targets!r}: {str(error).splitlines()[0]:.200}"
        ) from error
    if options.freeze_a:
        for title, p in adapted.named_parameters():
            if ".lora_A." in title or ".lora_embedding_A." in title:
                p.requires_grad_(False)
    return adapted


def _inner(name: str, auto: str, shape: tuple[int, ...], options: Any) -> tuple[Any, Any]:
    """The model of transformers, in float32 and without dropout, and its configuration."""
    if len(shape) != 1:
        raise ConfigError(f"model {name}: expected inputs of tokens (length,), got {shape}")
    transformers = library("transformers")
    kind = getattr(transformers, auto)
    if options.pretrained is None:
        try:
            config = transformers.AutoConfig.for_model(options.architecture)
        except ValueError:
            raise ConfigError(
                f"model {name}.architecture: expected a model type of transformers (bert, gpt2, …), got "
                f"{options.architecture!r}"
            ) from None
        _set(name, config, options.settings)
        try:
            return kind.from_config(config), config
        except ValueError as error:
            raise ConfigError(f"model {name}.settings: {str(error).splitlines()[0]}") from error
    argument = f"model {name}.pretrained"
    config = loaded(argument, options.pretrained, transformers.AutoConfig.from_pretrained)
    _set(name, config, options.settings)
    inner = loaded(
        argument,
        options.pretrained,
        kind.from_pretrained,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,  # never a pickle
    )
    return inner, config


def _set(name: str, config: Any, settings: dict[str, Any]) -> None:
    for field, value in settings.items():
        if not hasattr(config, field):
            valid = sorted(k for k, v in vars(config).items() if isinstance(v, int | float | str | bool))
            raise ConfigError(f"model {name}.settings.{field}: unknown key; valid: {', '.join(valid)}")
        setattr(config, field, value)
    for field, value in vars(config).copy().items():
        if "drop" in field and isinstance(value, float):
            setattr(config, field, 0.0)
