"""Linear cross-entropy: the head of a language model and its loss in one, without the logits of all tokens at once.

    loss_i = log sum_j exp(l_ij) - l_i,label(i)  +  z_loss (log sum_j exp(l_ij))^2,    l_ij = x_i . w_j

The second term, off by default, keeps the softmax's normaliser near 1 (PaLM, Chowdhery et al., 2022, arXiv:2204.02311,
section 5). With a soft cap c the logits are c tanh(l_ij / c) (Gemma 2, 2024, arXiv:2408.00118, section 2).

Tokens are taken some at a time (Cut Cross-Entropy: Wijmans et al., 2024, arXiv:2411.09009), and gradients are computed
along with the loss, while logits are there (Liger-Kernel: Hsu et al., 2024, arXiv:2410.10989).
"""

import functools

from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.liger import choose_liger
from zoo.ops.liger import linear_cross_entropy as liger_cross_entropy
from zoo.ops.linear_cross_entropy.chunked import linear_cross_entropy_chunked
from zoo.ops.linear_cross_entropy.labels import check_labels
from zoo.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from zoo.ops.op import Op


def _empty_outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor]:
    shapes = {"hidden": "n d", "weight": "v d", "bias": "v", "labels": "n"}
    check_shapes("linear_cross_entropy", shapes, hidden=hidden, weight=weight, bias=bias, labels=labels)
    return (hidden.new_empty(()),)


_REFERENCE, _CHUNKED = linear_cross_entropy_reference, linear_cross_entropy_chunked
_FORMS = {"reference": _REFERENCE, "chunked": _CHUNKED, "native": functools.partial(_CHUNKED, form="native")}
OP = Op(
    *("linear_cross_entropy", _empty_outputs),
    reference=_REFERENCE,
    chunked=_CHUNKED,
    kernels=("native",),
    has_own_operator=True,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    num_items: Tensor | float | None = None,
    kernels: str = "auto",
) -> Tensor:
    """The loss, a number in float32 (float64 for float64 inputs); differentiable, once, in hidden, weight and bias.

    Labels are not shifted. Products are taken in the dtype of the inputs, or of autocast; all else in that of the loss.
    On a GPU the check of the labels waits for it.

    Args:
        hidden: what the head reads, (n d) or (b t d).
        weight: of the head, (v d).
        labels: (n) or (b t), integers.
        bias: of the head, (v).
        ignore_index: the label of tokens that do not count. What stands in `hidden` there is not read.
        z_loss: weight of the squared log-normaliser.
        soft_cap: bound that the logits approach; None: they have none.
        num_items: what the sum over tokens is divided by; None: by how many count. Without any the loss is 0.
        kernels: which form runs (`zoo.ops.dispatch`); unless one is asked for, Liger-Kernel's on a GPU that has it.

    Raises:
        ValueError: if the shapes do not agree, a label is neither `ignore_index` nor from 0 to v-1, the soft cap is
            not positive, or the form asked for cannot run.
    """
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"linear_cross_entropy: soft_cap must be positive, got {soft_cap}")
    form = OP.form_for(hidden, weight, bias, labels, kernels=kernels)
    if hidden.dim() == 3:
        check_shapes("linear_cross_entropy", {"hidden": "b t d", "labels": "b t"}, hidden=hidden, labels=labels)
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
    _empty_outputs(hidden, weight, bias, labels)  # checks that they agree
    run = _FORMS[form]
    if choose_liger(hidden.device, kernels).backend == "liger":
        check_labels(labels, ignore_index, len(weight))
        run = liger_cross_entropy
    total = run(hidden, weight, bias, labels, ignore_index, z_loss, soft_cap)
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp(min=1)
    return total / num_items
