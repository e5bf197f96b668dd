"""clipress: compress, export, measure and serve CLIP models. Importing it loads nothing heavy."""

__version__ = "0.1.0"
