"""Publishing on the Hugging Face Hub: `zoo publish CHECKPOINT user/name`.

upload.py        one commit, which goes on where it stopped and replaces nothing of others
publication.py   what of a checkpoint is published
places.py        the recipe without the paths of the disk
card.py          the model card, written from facts at hand
scores.py        results of lm-eval, for the card
"""
