"""The heads on the spine: a causal language model with its losses, and classifiers.

heads_of   all of them, of a model class
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from zoo.cache import RECURRENT
from zoo.config import ZooConfig
from zoo.mixer import AuxiliaryLoss, Mixer
from zoo.modeling import ZooModel, ZooModelOutput, ZooPreTrainedModel
from zoo.nn import LanguageModelHead, soft_cap


@dataclass
class ZooCausalLMOutput(CausalLMOutputWithPast):
    """What a causal language model returns."""

    aux_loss: Tensor | None = None
    """What the auxiliary losses add to `loss`; None where there are none, or not in training."""
    aux_losses: dict[str, Tensor] | None = None
    """Each of them by name, without its coefficient."""


class ZooForCausalLM(ZooPreTrainedModel):
    """A model with a language-modelling head; made by `heads_of`."""

    model_class: type[ZooModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = LanguageModelHead(config)
        self.soft_cap = config.soft_cap
        self.post_init()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """(b t d) -> (b t vocabulary). A model that overrides this has its loss from logits, skipped or not."""
        logits = self.lm_head(hidden_states)
        return logits if self.soft_cap is None else soft_cap(logits, self.soft_cap)

    def auxiliary_losses(self, outputs: ZooModelOutput) -> list[AuxiliaryLoss]:
        """What training adds to the loss of the labels: what the mixers ask for."""
        mixers = [module for module in self.model.modules() if isinstance(module, Mixer)]
        return [loss for mixer in mixers for loss in mixer.auxiliary_losses(outputs.shared or {}, outputs.mask)]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args, **kwargs) -> None:
        """As transformers does, but always under one name: it has another for classes with "mamba" in theirs."""
        theirs = "cache_params" if "mamba" in type(self).__name__.lower() else "past_key_values"
        if "past_key_values" in model_kwargs:
            model_kwargs[theirs] = model_kwargs.pop("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if theirs in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop(theirs)

    def _get_static_cache_init_shape(self):
        """Heads and width of the keys, for a cache that is allocated early; None where no layer has keys."""
        has_keys = set(self.config.layer_types) != {RECURRENT}
        return super()._get_static_cache_init_shape() if has_keys else None

    def _head_gives_loss(self) -> bool:
        """Whether nothing stands between the hidden states and the logits that `lm_head` does not know of."""
        is_own = isinstance(self.lm_head, LanguageModelHead) and self.tp_size is None
        return is_own and type(self).compute_logits is ZooForCausalLM.compute_logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        z_loss: float = 0.0,
        **kwargs,
    ) -> ZooCausalLMOutput:
        """Logits, and the mean loss of predicting `labels`; in training the auxiliary losses are added to it.

        Args:
            labels: (b t), the input ids themselves (the shift is made here); -100 is not predicted, and neither is
                the first token of a document that `position_ids` pack behind another.
            logits_to_keep: how many of the last positions get logits; 0 means all. Or the indices of the positions.
            skip_logits: give the loss only, which then needs no memory for the logits of all tokens; where something
                stands between head and logits (an adapter, tensor parallelism, a `compute_logits` of the model) they
                are computed and dropped.
            z_loss: weight of the squared log-normaliser of the logits, averaged like the loss and added to it
                (arXiv:2204.02311, section 5).
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache:
                as for `ZooModel.forward`.
            kwargs: `shift_labels`, (b t), in place of labels what each position is to predict, -100 nothing;
                `num_items_in_batch`, what the sum over the predicted tokens is divided by, in place of their number;
                and as for `ZooModel.forward`.

        Raises:
            ValueError: as `ZooModel.forward`; if logits are skipped and there is nothing to predict, or some of them
                are to be kept.
        """
        if skip_logits and labels is None and kwargs.get("shift_labels") is None:
            raise ValueError("skip_logits leaves the loss only: pass labels or shift_labels")
        if skip_logits and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("skip_logits gives no logits, so there are none for logits_to_keep")
        outputs: ZooModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if labels is not None and outputs.segments is not None:  # the end of a document does not predict the next
            starts = torch.diff(outputs.segments, dim=1, prepend=outputs.segments[:, :1]) != 0
            labels = labels.masked_fill(starts, -100)
        targets = _targets(labels, **kwargs)
        logits = loss = aux_loss = aux_losses = None
        if skip_logits and self._head_gives_loss():
            options = {"z_loss": z_loss, "soft_cap": self.soft_cap, "num_items": kwargs.get("num_items_in_batch")}
            loss = self.lm_head(outputs.last_hidden_state, targets, **options)
        else:
            logits = self.compute_logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            if targets is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
                loss = loss + z_loss * _mean_square_normalizer(logits, targets, **kwargs) if z_loss else loss
        if targets is not None and self.training and (found := self.auxiliary_losses(outputs)):
            aux_loss, aux_losses = _add_up(found, targets.to(loss.device))
            loss = loss + aux_loss * _share_of_step(targets, **kwargs)
        return ZooCausalLMOutput(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            aux_losses=aux_losses,
        )


def _add_up(losses: list[AuxiliaryLoss], targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum with coefficients, and by name the values without; those of one name are averaged.

    A row counts by what it is to predict, targets (b t), as it does in the loss of the labels.
    """
    counts = (targets != -100).sum(1)
    by_name: dict[str, list[AuxiliaryLoss]] = {}
    for loss in losses:
        value = loss.value.to(targets.device)
        mean = counts.to(value.dtype) @ value / counts.sum().clamp(min=1)
        by_name.setdefault(loss.name, []).append(loss._replace(value=mean))
    total = sum(sum(x.coefficient * x.value for x in same) / len(same) for same in by_name.values())
    return total, {name: sum(x.value.detach() for x in same) / len(same) for name, same in by_name.items()}


def _targets(labels: Tensor | None, shift_labels: Tensor | None = None, **unused) -> Tensor | None:
    """What each position is to predict, (b t), -100 nothing; None where nothing is asked for."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def _mean_square_normalizer(
    logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None, **unused
) -> Tensor:
    """(log sum_j exp(l_j))^2 of logits (b t v), averaged like the loss of targets (b t)."""
    counted = targets != -100
    normalizers = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=-1)
    total = normalizers.square().masked_fill(~counted, 0.0).sum()
    return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _share_of_step(targets: Tensor, num_items_in_batch: Tensor | int | None = None, **unused) -> Tensor | float:
    """How much of a step this call is, where the caller accumulates gradients over several and says how many tokens."""
    return 1.0 if num_items_in_batch is None else (targets != -100).sum() / num_items_in_batch


def heads_of(model: type[ZooModel]) -> tuple[type[ZooForCausalLM], type[PreTrainedModel], type[PreTrainedModel]]:
    """The classes `<Name>ForCausalLM`, `...ForSequenceClassification`, `...ForTokenClassification` of `<Name>Model`.

    Assign them to names in the module of the model, where pickle and `save_pretrained` look for them.
    """
    name = model.__name__.removesuffix("Model")
    shared = {"__module__": model.__module__, "config_class": model.config_class}

    def derive(suffix: str, *bases: type, **attributes: Any) -> type:
        return type(name + suffix, bases, {**shared, **attributes, "__qualname__": name + suffix})

    return (
        derive("ForCausalLM", ZooForCausalLM, GenerationMixin, model_class=model),
        derive("ForSequenceClassification", GenericForSequenceClassification, ZooPreTrainedModel),
        derive("ForTokenClassification", GenericForTokenClassification, ZooPreTrainedModel),
    )
