"""Pretraining: `zoo train RECIPE [key=value ...]`, the same program as `accelerate launch ... -m zoo.train RECIPE`.

config.py        what a recipe may say
corpora.py       text that needs no download
sources.py       corpora, datasets and tasks, read in one way
tokenizer.py     a published tokenizer, or one trained on the documents
store.py         tokens on disk, memory-mapped, appended to while they are read
batches.py       rows and their order: a batch is a function of seed, step and rank
data.py          all of that for a recipe
optimizer.py     AdamW, Muon, learning rates
model.py         what is trained, new or from a checkpoint
distributed.py   one process or many; engine.py, a model whole or shared out; zero.py, by DeepSpeed
loop.py          the run
checkpoint.py    what it saves and goes on from; output.py, its folder
stop.py          how it is ended; launch.py, `zoo launch`, which lets it end well
validation.py    how well it predicts held-out text
report.py        log, progress bar, pictures
plan.py          what a run will take, before it runs; memory.py, the memory of a micro-batch
"""
