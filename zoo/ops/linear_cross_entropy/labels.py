"""Labels are words of the vocabulary, or not to be counted."""

from torch import Tensor


def check_labels(labels: Tensor, ignore_index: int, v: int) -> None:
    """Raise ValueError on labels that are no integers, or one that is neither `ignore_index` nor from 0 to v-1."""
    if labels.is_floating_point():
        raise ValueError(f"linear_cross_entropy: labels are {labels.dtype}, wanted integers")
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= v))]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy: label {wrong[0].item()} is out of range: wanted 0 to {v - 1}, "
            f"or {ignore_index} for a token that does not count"
        )
