"""lm-eval's tasks on a model of the zoo: `zoo.evaluate.harness` runs them, `zoo.evaluate.lm` is the model; an extra."""
