"""Models of text through ``transformers`` (the extra ``hf``): by configuration, from a local folder or the hub.

Their input is int64 ``(B, L)`` with PAD after the end, from which they make the attention mask. Dropout is
off: its masks would be randomness outside :mod:`fedmpi.random`.

Shape suffixes: B samples, L tokens, E features, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmpi.errors import ConfigError
from fedmpi.tasks.dataset import PAD
from fedmpi.tasks.hf import library, loaded
from fedmpi.tasks.models.initial import ModelOptions


class TransformerOptions(ModelOptions):
    pretrained: str | None = Field(
        None,
        description="a folder as transformers saves it, a folder in the data folder (minilm) or a hub name; "
        "default: initial values",
    )
    settings: dict[str, int | float | str | bool] = Field(
        {}, description="fields of transformers' own configuration, e.g. hidden_size"
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
        model.inner.requires_grad_(False)
    return model


def decoder(shape: tuple[int, ...], classes: int, options: DecoderOptions) -> nn.Module:
    """A language model: logits ``(B, L, V)``; the loss is ``next_token``."""
    inner, config = _inner("decoder", "AutoModelForCausalLM", shape, options)
    return _LanguageModel(inner, config.max_position_embeddings, shape[0], "decoder")


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
