"""Jamba: Mamba, attention and mixtures of experts in one stack (Lieber et al., 2024, arXiv:2403.19887).

Letters: b batch, t tokens, e inner channels, n states of a channel, r rank of the time step.
"""

import math

from huggingface_hub.dataclasses import strict
from torch import Tensor
from zoo.plugins.mamba.modeling import Mamba

from zoo.modeling import ZooModel, heads_of
from zoo.moe import MoEConfig
from zoo.nn import RMSNorm


@strict
class JambaConfig(MoEConfig):
    """Configuration of Jamba; the experts are described by the fields of `MoEConfig`.

    Args:
        attn_layer_period, attn_layer_offset: layer i has attention where i modulo the period is the offset, and Mamba
            elsewhere, unless `mixers` says otherwise.
        expert_layer_period, expert_layer_offset: likewise a mixture of experts or one gated MLP, unless
            `channel_mixers` says otherwise.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads, each for a group of query heads. Default: one a query head.
        head_dim: width of a head. Default: hidden_size / num_attention_heads.
        attention_bias: whether the four projections of attention have biases.
        attention_dropout: rate of dropout on the attention weights in training.
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
        *MoEConfig.sizes,
        *("attn_layer_period", "expert_layer_period", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("state_size", "expand", "conv_kernel", "time_step_rank"),
    )
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "colwise_gather_output",
        "layers.*.channel_mixer.gate_proj": "colwise",
        "layers.*.channel_mixer.up_proj": "colwise",
        "layers.*.channel_mixer.down_proj": "rowwise",
    }

    num_experts: int = 16
    norm_topk_prob: bool = False
    router_z_loss_coef: float = 0.0
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
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
        n = range(self.num_hidden_layers)
        self.mixers = self.mixers or [
            "attention" if i % self.attn_layer_period == self.attn_layer_offset else "jamba_mamba" for i in n
        ]
        self.channel_mixers = self.channel_mixers or [
            "moe" if i % self.expert_layer_period == self.expert_layer_offset else "swiglu" for i in n
        ]
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.time_step_rank = self.time_step_rank or math.ceil(self.hidden_size / 16)

    def validate_architecture(self):
        for kind in ("attn", "expert"):
            offset, period = (getattr(self, f"{kind}_layer_{name}") for name in ("offset", "period"))
            if not 0 <= offset < period:
                raise ValueError(f"{kind}_layer_offset ({offset}) must be below {kind}_layer_period ({period})")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
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
