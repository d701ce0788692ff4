"""The kernels: one folder an op, each with a reference in the paper's words and the fast forms that must equal it."""
