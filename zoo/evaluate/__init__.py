"""How well a model predicts texts, and lm-eval's tasks: `zoo.evaluate.harness` and `zoo.evaluate.lm`, an extra."""

from zoo.evaluate.text import PositionScore, TextScore, score_by_position, score_text

__all__ = ["PositionScore", "TextScore", "score_by_position", "score_text"]
