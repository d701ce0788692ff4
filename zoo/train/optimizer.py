"""Optimizers and learning rates, from the groups that a model declares for its parameters."""

import math
from collections.abc import Callable

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from zoo.modeling import ZooPreTrainedModel
from zoo.train.config import TrainSection


def make_optimizers(model: ZooPreTrainedModel, settings: TrainSection) -> list[Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of linear layers inside of the blocks, AdamW for the others.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) makes a matrix's update orthogonal. It is
    scaled to the size of AdamW's (Liu et al., 2025, arXiv:2502.16982, section 2.2), so that one learning rate does.
    """
    groups = model.parameter_groups(settings.learning_rate, settings.weight_decay)
    for group in groups:
        group["peak"] = group["lr"]
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw":
        return [AdamW(groups, betas=betas, eps=settings.epsilon, fused=True)]
    matrices = {id(p) for p in muon_matrices(model)}
    inside, outside = ([_part(group, matrices, wanted) for group in groups] for wanted in (True, False))
    return [
        Muon([group for group in inside if group["params"]], adjust_lr_fn="match_rms_adamw"),
        AdamW([group for group in outside if group["params"]], betas=betas, eps=settings.epsilon, fused=True),
    ]


def muon_matrices(model: ZooPreTrainedModel) -> list[nn.Parameter]:
    """What Muon takes: the weights of linear layers inside of the blocks."""
    modules = (module for layer in model.base_model.layers for module in layer.modules())
    return [module.weight for module in modules if isinstance(module, nn.Linear)]


def _part(group: dict, chosen: set[int], wanted: bool) -> dict:
    return {**group, "params": [p for p in group["params"] if (id(p) in chosen) == wanted]}


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Set the rate of every group to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def learning_rate_schedule(settings: TrainSection, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate in each of `steps` steps, counted from 0.

    Linear up to 1 in the warm-up. Then `cosine` or `linear` down to the final part at the end; or `wsd` (Hu et al.,
    2024, arXiv:2404.06395): 1 until the last part of the steps, in which it falls linearly.
    """
    warmup = max(1, round(steps * settings.warmup_fraction))
    fall = round(steps * settings.decay_fraction) if settings.schedule == "wsd" else steps - warmup
    final = settings.final_fraction

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, max(0.0, (step + 1 - (steps - fall)) / max(1, fall)))
        left = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
        return final + (1 - final) * left

    return factor
