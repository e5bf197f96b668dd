"""The steps of `clipress run`, callable from Python: the only package that puts compress, export, bench and serve in a row."""
