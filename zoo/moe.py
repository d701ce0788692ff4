"""Mixture of experts: a channel mixer of many gated MLPs, of which each token takes a few (arXiv:1701.06538).

    p = softmax(W x)                              Router, MoE.route
    y = sum of p_e expert_e(x) over the k largest p_e, + shared(x)

In training the router is asked to spread the tokens and to keep its logits small:

    E sum_e f_e P_e       load balancing (Switch Transformer, arXiv:2101.03961, eq. 4): f_e is the share of tokens that
                          take expert e, P_e the mean of p_e; k where all is even
    mean (log sum exp)^2  z-loss (ST-MoE, arXiv:2202.08906, eq. 5)

over the tokens of a row, as DeepSeek-V3 balances each sequence (arXiv:2412.19437, eq. 17-20). Over a batch the first
would be another loss for every way to divide the batch among processes and steps of accumulation.

Letters: b batch, t tokens, n tokens of all rows, d width, f inner width of an expert, E experts, k experts of a token.
"""

# ruff: noqa: N806
# E and P are capitals in the field.

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.mixer import AuxiliaryLoss, Mixer, Shared, Tokens
from zoo.nn import GatedActivation, GatedMLP
from zoo.ops.checks import has_values
from zoo.ops.grouped_linear import choose_grouped_linear, grouped_linear
from zoo.ops.linear import linear


@strict
class MoEConfig(ZooConfig):
    """The fields of a model that can have a mixture of experts; a configuration class derives from it.

    Args:
        num_experts: number of experts E.
        num_experts_per_tok: how many of them a token takes.
        n_shared_experts: experts that every token takes besides; one MLP of their widths together.
        moe_intermediate_size: inner width of an expert. Default: intermediate_size.
        norm_topk_prob: whether the weights of a token's experts are made to sum to 1.
        router_aux_loss_coef: weight of the load-balancing loss in training.
        router_z_loss_coef: weight of the z-loss in training.
    """

    sizes = (*ZooConfig.sizes, "num_experts", "num_experts_per_tok", "moe_intermediate_size")

    num_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 1e-3
    router_z_loss_coef: float = 1e-3

    def validate_experts(self):
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"a token takes num_experts_per_tok ({self.num_experts_per_tok}) of num_experts ({self.num_experts})"
            )
        for name in ("n_shared_experts", "router_aux_loss_coef", "router_z_loss_coef"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {value}")


class Router(nn.Module):
    """Logits of the experts for each token."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(b t d) -> (b t E)."""
        return linear(x, self.weight)


class Experts(nn.Module):
    """Gated MLPs, their weights packed as transformers packs them: gate and up behind each other."""

    ops = ("grouped_linear",)

    def __init__(self, config: MoEConfig):
        super().__init__()
        E, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size or config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, f))
        self.act = GatedActivation(config)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted sum of what the chosen experts make of each token; 0 for padding, which none of them sees.

        Args:
            x: tokens, (n d).
            weights, chosen: of each token the weights and indices of its experts, (n k).
            mask: (n), False at padding.
        """
        n, k = chosen.shape
        if n == 1 and mask is None and _loops(x):
            return self._mix_one(x, weights, chosen)
        if mask is not None:  # behind all experts
            chosen = chosen.masked_fill(~mask[:, None], len(self.down_proj))
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(len(self.down_proj), device=x.device), right=True)
        gate_up = grouped_linear(x.index_select(0, order // k), self.gate_up_proj, ends)
        y = grouped_linear(self.act(*gate_up.chunk(2, dim=-1)), self.down_proj, ends)
        y = torch.empty_like(y).index_copy(0, order, y).unflatten(0, (n, k))
        return (weights[..., None].to(y.dtype) * y).sum(1)

    def _mix_one(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same for a single token, without sorting anything."""
        y = []
        for expert in chosen[0].tolist():
            gate_up = linear(x, self.gate_up_proj[expert])
            y.append(linear(self.act(*gate_up.chunk(2, dim=-1)), self.down_proj[expert]))
        y = torch.cat(y)
        return weights.to(y.dtype) @ y


def _loops(x: Tensor) -> bool:
    """Whether the experts of such tokens run one after the other, for all to see."""
    return has_values(x) and choose_grouped_linear(x.device, x.dtype).backend == "loop"


class MoE(Mixer):
    """The mixture of experts. Padding takes none of them, and an expert that no token takes does not run."""

    config_fields = (
        *("num_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "norm_topk_prob"),
        *("router_aux_loss_coef", "router_z_loss_coef"),
    )

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts: GatedMLP | None = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size or config.intermediate_size
            self.shared_experts = GatedMLP(config, layer_idx, config.n_shared_experts * width)
        self._logits = f"router_logits.{layer_idx}"

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        """As of any mixer; in training it leaves its logits (b t E) for `auxiliary_losses`."""
        logits = self.router(x)
        weights, chosen = self.route(logits)
        mask = None if tokens.mask is None else tokens.mask.flatten()
        y = self.experts(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1), mask).view(x.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, shared, tokens, cache)[0]
        return y, shared | {self._logits: logits} if self.training else shared

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (... E) -> of each token the weights and indices of its experts, both (... k), weights in float32."""
        weights, chosen = _probabilities(logits).topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def auxiliary_losses(self, shared: Shared, mask: Tensor | None) -> list[AuxiliaryLoss]:
        if self._logits not in shared:  # the layer is not in training, the model is
            return []
        logits = shared[self._logits]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        real = logits.new_ones(logits.shape[:-1]) if mask is None else mask.to(logits.dtype)
        share = real / real.sum(1, keepdim=True).clamp(min=1)  # of each token in the mean of its row

        def mean(x: Tensor) -> Tensor:
            """Over the real tokens of each row, (b t E) -> (b E)."""
            return torch.einsum("bt,bte->be", share, x)

        taken = torch.zeros_like(logits).scatter(-1, self.route(logits)[1], 1.0)
        balance = self.config.num_experts * (mean(taken) * mean(_probabilities(logits))).sum(-1)
        z = (share * logits.logsumexp(dim=-1).square()).sum(1)
        return [
            AuxiliaryLoss("load_balancing_loss", self.config.router_aux_loss_coef, balance),
            AuxiliaryLoss("router_z_loss", self.config.router_z_loss_coef, z),
        ]

    def reset_parameters(self) -> None:
        """As other projections."""
        for weight in (self.router.weight, self.experts.gate_up_proj, self.experts.down_proj):
            init.normal_(weight, std=self.config.initializer_range)


def _probabilities(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
