"""Pretrained or new transformers as trunks for text (the extra `text`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtrain.data.features import Feature
from mtrain.data.tokens import PADDING, SECOND, TOKENS, located, require_transformers
from mtrain.errors import UserError, matches, nearest
from mtrain.model.dropout import Dropout

EVAL_BUCKETS = 32  # an evaluation's forward pass has some 2,000 rows
_HIDDEN = ("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "mlp_dropout")
_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""What configurations call the dropout of hidden states, and of attention weights."""


class TextEncoder(nn.Module):
    """A Hugging Face encoder over the token ids of the feature `Tokens`, pooled to one vector a text: `[B, L]` to `[B, D]`.

    The rows of a batch are sorted by length and run in a few equal parts (buckets), each cut to its longest row, then put
    back in order. What comes out of a row depends neither on its padding nor on the rows beside it. The number of buckets is
    fixed, so that all processes gather sharded layers equally often.

    Dropout of hidden states is keyed by the row, as in the built-in trunks: any number of processes draws the same masks.
    Masks of attention weights are made inside fused kernels from torch's generator, hence off unless asked for: with them a
    run is reproducible with the same number of processes only, as are models that call dropout as a function (BART, T5).

    Args:
        model: hub name or local folder of pretrained weights, loaded in float32. Of a model with encoder and decoder the
            encoder is used.
        config: in its place, a configuration of new weights: `model_type` and that type's own options.
        pool: mean over tokens, the first token, or the last token (for models whose tokens see only those before them).
        dropout: of hidden states; default: as the model's configuration says.
        attention_dropout: of attention weights.
        buckets: parts of a training batch. More of them compute less padding, in smaller products.
        gradient_checkpointing: compute each block again in the backward pass instead of keeping its activations.
        freeze: patterns of parameters that are not trained, such as `embeddings.*` or `encoder.layer.[0-5].*`.

    Raises:
        UserError: no such model or option, or texts longer than the model takes.
    """

    unpacks = TOKENS

    def __init__(
        self,
        in_features: int,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        pool: Literal["mean", "cls", "last"] = "mean",
        dropout: float | None = None,
        attention_dropout: float = 0.0,
        buckets: int = 4,
        gradient_checkpointing: bool = False,
        freeze: Sequence[str] = (),
    ):
        super().__init__()
        require_transformers("TextEncoder")
        if (model is None) == (config is None):
            raise UserError("TextEncoder: give model (a hub name or folder) or config (for new weights), one of the two")
        if buckets < 1:
            raise UserError(f"TextEncoder: buckets is {buckets}, expected at least 1")
        for option, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if share is not None and not 0 <= share < 1:
                raise UserError(f"TextEncoder: {option} is {share}, expected a probability, at least 0 and below 1")
        self.pool, self.buckets = pool, buckets
        self.model = _build(model, config, dropout, attention_dropout)
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and in_features > most:
            raise UserError(
                f"TextEncoder: inputs of {in_features} numbers, but the model takes texts of {most} tokens; lower max_length "
                "of Tokens, whose ids are all that it reads"
            )
        self.pad_id = getattr(self.model.config, "pad_token_id", None) or 0
        self.takes_types = (getattr(self.model.config, "type_vocab_size", None) or 0) > 1
        self.out_features = self._check(in_features)
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self._freeze(freeze)
        self.keys = _Keys()
        self._key_dropout()
        if gradient_checkpointing:
            if not self.model.supports_gradient_checkpointing:
                raise UserError(f"TextEncoder: {type(self.model).__name__} has no gradient_checkpointing; leave it out")
            options = {"use_reentrant": False, "context_fn": self.keys.for_checkpoint}
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the blocks that FSDP2 gathers one by one."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return sorted({type(m).__name__ for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)})

    def check_vocabulary(self, features: Sequence[Feature]) -> None:
        """Refuse features with token ids that have no embedding."""
        for feature in features:
            if (found := feature.state["vocabulary"]) > self.vocabulary:
                raise UserError(
                    f"inputs.{feature.state['columns'][0]}: the tokenizer has ids up to {found - 1}, but the embedding of "
                    f"TextEncoder has {self.vocabulary} rows; use the model's own tokenizer, or vocab_size: {found} in config"
                )

    def forward(self, x_BL: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Token ids, `PADDING` behind the last one, to `[B, D]`."""
        if torch.compiler.is_exporting():  # lengths that depend on the rows cannot be
            return self._encode(x_BL)
        length_B = (x_BL != PADDING).sum(1)
        order_B = length_B.argsort(stable=True)
        parts = order_B.tensor_split(self.buckets if self.training else EVAL_BUCKETS)
        ends = [end - 1 for end in accumulate(map(len, parts))]
        longest = length_B[order_B[ends]].tolist() if len(order_B) else [1] * len(parts)
        found = []
        for rows, length in zip(parts, longest, strict=True):
            if len(rows):
                x, self.keys.now = x_BL[rows, : max(1, length)], None if keys_B is None else keys_B[rows]
                found.append(self._encode(x))
            else:  # a part of a small batch: sharded layers are gathered as often as on the other ranks
                found.append(self._encode(x_BL.new_zeros(1, 1))[:0])
        self.keys.now = None
        place_B = torch.empty_like(order_B).scatter_(0, order_B, torch.arange(len(order_B), device=order_B.device))
        return torch.cat(found)[place_B]

    def _encode(self, x_BL: Tensor) -> Tensor:
        ids_BL = x_BL.long()
        mask_BL = ids_BL != PADDING
        given = {"input_ids": torch.where(mask_BL, ids_BL % SECOND, self.pad_id), "attention_mask": mask_BL.long()}
        if self.takes_types:
            given["token_type_ids"] = torch.where(mask_BL, ids_BL // SECOND, 0)
        h_BLD = self.model(**given).last_hidden_state
        if self.pool == "cls":
            return h_BLD[:, 0]
        if self.pool == "last":
            return h_BLD[torch.arange(h_BLD.shape[0], device=h_BLD.device), mask_BL.sum(1).clamp(min=1) - 1]
        weight_BL1 = mask_BL.unsqueeze(-1).float()
        return (h_BLD.float() * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)

    def _check(self, length: int) -> int:
        """Width of the features, by a trial pass over one text of full length; what it does not use is not trained: DDP would
        wait for its gradient."""
        training = self.model.training
        parameters = list(self.model.parameters())
        try:
            z_BD = self.train(False)._encode(torch.zeros(1, length))
            grads = torch.autograd.grad(z_BD.sum(), parameters, allow_unused=True)
        except Exception as error:  # the model's own code may raise anything
            problem = f"TextEncoder: {type(self.model).__name__} fails on a text of {length} tokens ({error})"
            raise UserError(f"{problem}; is it a model for text, and of that length?") from error
        finally:
            self.train(training)
        for p, grad in zip(parameters, grads, strict=True):
            p.requires_grad_(grad is not None)
        return z_BD.shape[1]

    def _freeze(self, patterns: Sequence[str]) -> None:
        named = dict(self.model.named_parameters())
        for pattern in patterns:
            chosen = [p for name, p in named.items() if matches(name, pattern)]
            if not chosen:
                raise UserError(
                    f"TextEncoder: freeze: no parameter '{pattern}'{nearest(pattern, named)}; one is '{next(iter(named))}'"
                )
            for p in chosen:
                p.requires_grad_(False)

    def _key_dropout(self) -> None:
        """Put keyed dropout in place of the model's dropout modules."""
        plain = [name for name, module in self.model.named_modules() if type(module) is nn.Dropout]
        for number, name in enumerate(plain):
            parent, _, child = name.rpartition(".")
            p = self.model.get_submodule(name).p
            setattr(self.model.get_submodule(parent), child, _KeyedDropout(p, number, self.keys))


class _Keys:
    """Keys of the rows that are in the model now; None: no keyed dropout."""

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def for_checkpoint(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What holds when a block runs, and when it runs again in the backward pass, after other rows."""
        return nullcontext(), self._restored(self.now)

    @contextmanager
    def _restored(self, keys_B: Tensor | None) -> Iterator[None]:
        self.now, before = keys_B, self.now
        try:
            yield
        finally:
            self.now = before


class _KeyedDropout(Dropout):
    """Dropout of `[B, ...]` where B rows have keys."""

    def __init__(self, p: float, layer: int, keys: _Keys):
        super().__init__(p, layer)
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        keys_B = self.keys.now
        return super().forward(x, keys_B if keys_B is not None and len(keys_B) == len(x) else None)


def _build(name: str | None, options: dict[str, Any] | None, dropout: float | None, attention_dropout: float) -> Any:
    """The model in float32, without a decoder."""
    from transformers import AutoConfig, AutoModel

    if options is not None:
        config = _configuration(options)
    else:
        name = located("TextEncoder: model", str(name))
        with _refused(f"model '{name}' cannot be loaded", "expected a hub name, or a folder with config.json and weights"):
            config = AutoConfig.from_pretrained(name)
    for option, share, keys in (("dropout", dropout, _HIDDEN), ("attention_dropout", attention_dropout, _ATTENTION)):
        known = [key for key in keys if hasattr(config, key)]
        if share and not known:
            raise UserError(f"TextEncoder: {option} is {share}, but a {config.model_type} has none; leave it out")
        for key in known if share is not None else ():
            setattr(config, key, share)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if options is not None:
        with _refused(f"config {options} makes no model", "see the options of that model_type"):
            model = AutoModel.from_config(config, dtype=torch.float32)
    else:
        with _refused(f"model '{name}' cannot be loaded", "expected weights that AutoModel can load"):
            model = AutoModel.from_pretrained(str(name), config=config, dtype=torch.float32)
    return model.get_encoder() if config.is_encoder_decoder else model


def _configuration(options: dict[str, Any]) -> Any:
    """A configuration from plain options, none of them unknown."""
    from transformers import CONFIG_MAPPING, AutoConfig

    rest = {key: value for key, value in options.items() if key != "model_type"}
    if "model_type" not in options:
        raise UserError("TextEncoder: config lacks model_type, expected one such as bert")
    if (kind := str(options["model_type"])) not in CONFIG_MAPPING:
        raise UserError(f"TextEncoder: config: unknown model_type '{kind}'{nearest(kind, CONFIG_MAPPING)}")
    with _refused(f"config {options} is not one", f"expected options of model_type {kind}"):
        default = AutoConfig.for_model(options["model_type"])
        known = default.to_dict().keys() | default.attribute_map.keys()
        if unknown := [key for key in rest if key not in known]:
            raise UserError(f"TextEncoder: config: unknown option '{unknown[0]}'{nearest(unknown[0], known)}")
        return AutoConfig.for_model(options["model_type"], **rest)


@contextmanager
def _refused(problem: str, hint: str) -> Iterator[None]:
    """Errors of transformers in one line, and its reports (unused weights, progress) unsaid."""
    from transformers.utils import logging as chatter

    before, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.ERROR)
    chatter.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds, for what is not there, not complete or not a model
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"TextEncoder: {problem} ({reason}); {hint}") from None
    finally:
        chatter.set_verbosity(before)
        if bars:
            chatter.enable_progress_bar()
