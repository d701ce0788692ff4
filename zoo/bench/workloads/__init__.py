"""One module an op: its sizes, and how other libraries compute the same. `ON_CPU` and `ON_GPU` are what is measured."""
