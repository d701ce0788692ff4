"""How well a model predicts texts, and lm-eval's tasks: `zoo.evaluate.harness` and `zoo.evaluate.lm`, an extra."""

from zoo.evaluate.text import PositionScore, score_by_position

__all__ = ["PositionScore", "score_by_position"]
