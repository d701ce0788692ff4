"""Pretraining: `zoo train RECIPE [key=value ...]`, the same program as `python -m zoo.train`.

config.py   what a recipe may say
data.py     corpora without a download, the tokenizer, batches
loop.py     the loop, its log, its checkpoints
"""
