"""`python -m zoo.evaluate`: lm-eval's own command line where `--model zoo` and `--model hf` know the zoo's models."""

from lm_eval.__main__ import cli_evaluate

import zoo.evaluate.lm  # noqa: F401 (it registers the model)

if __name__ == "__main__":
    cli_evaluate()
