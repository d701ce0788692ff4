"""Jamba: Mamba, attention and mixtures of experts in one stack (Lieber et al., 2024, arXiv:2403.19887).

Letters: b batch, t tokens, e inner channels, n states of a channel, r rank of the time step.
"""

import math

from huggingface_hub.dataclasses import strict
from torch import Tensor
from zoo.plugins.mamba.modeling import Mamba

from zoo.config import AttentionConfig
from zoo.heads import heads_of
from zoo.modeling import ZooModel
from zoo.moe import MoEConfig
from zoo.nn import RMSNorm


@strict
class JambaConfig(AttentionConfig, MoEConfig):
    """Configuration of Jamba: the fields of `AttentionConfig`, those of `MoEConfig` for the experts, and more.

    Args:
        attn_layer_period, attn_layer_offset: layer i has attention where i modulo the period is the offset, and Mamba
            elsewhere, unless `mixers` says otherwise.
        expert_layer_period, expert_layer_offset: likewise a mixture of experts or one gated MLP, unless
            `channel_mixers` says otherwise.
        state_size: states n of a channel of Mamba.
        expand: inner channels e for each of the width.
        conv_kernel: tokens that its short convolution sees.
        use_conv_bias: whether it has a bias.
        use_bias: whether the projections into and out of Mamba have one.
        time_step_rank: rank r of the projection to the time step. Default: hidden_size / 16, rounded up.
        time_step_min, time_step_max: range of the time steps at the start of training.
        time_step_floor: the least of them.
    """

    model_type = "zoo_jamba"
    sizes = (
        *(*MoEConfig.sizes, *AttentionConfig.sizes, "attn_layer_period", "expert_layer_period"),
        *("state_size", "expand", "conv_kernel", "time_step_rank"),
    )
    base_model_tp_plan = {
        **AttentionConfig.base_model_tp_plan,
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "colwise_gather_output",
    }

    num_experts: int = 16
    norm_topk_prob: bool = False
    router_z_loss_coef: float = 0.0
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_rank: int | None = None
    time_step_min: float = 1e-3
    time_step_max: float = 1e-1
    time_step_floor: float = 1e-4

    def fill_defaults(self):
        super().fill_defaults()
        n = range(self.num_hidden_layers)
        self.mixers = self.mixers or [
            "attention" if i % self.attn_layer_period == self.attn_layer_offset else "jamba_mamba" for i in n
        ]
        self.channel_mixers = self.channel_mixers or [
            "moe" if i % self.expert_layer_period == self.expert_layer_offset else "swiglu" for i in n
        ]
        self.time_step_rank = self.time_step_rank or math.ceil(self.hidden_size / 16)

    def validate_architecture(self):
        for kind in ("attn", "expert"):
            offset, period = (getattr(self, f"{kind}_layer_{name}") for name in ("offset", "period"))
            if not 0 <= offset < period:
                raise ValueError(f"{kind}_layer_offset ({offset}) must be below {kind}_layer_period ({period})")
        if not 0 < self.time_step_min <= self.time_step_max < math.inf:
            raise ValueError(
                f"time steps need a range: time_step_min {self.time_step_min}, time_step_max {self.time_step_max}"
            )


class JambaMamba(Mamba):
    """The selective state space of Mamba, with RMS norms on time step, B and C (arXiv:2403.19887, section 6.4)."""

    config_fields = tuple(field for field in Mamba.config_fields if field != "mixer_rms_eps")

    def __init__(self, config: JambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(config, width) for width in self.widths)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the token, of x (b t e): time step (b t r), B and C (b t n)."""
        dt, B, C = self.x_proj(x).split(self.widths, dim=-1)  # noqa: N806 (capitals in the field)
        return self.dt_norm(dt), self.B_norm(B), self.C_norm(C)


class JambaModel(ZooModel):
    config: JambaConfig


JambaForCausalLM, JambaForSequenceClassification, JambaForTokenClassification = heads_of(JambaModel)
