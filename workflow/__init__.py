"""The steps of `clipress run`, callable from Python: the only package that combines compress, export, bench and serve."""
