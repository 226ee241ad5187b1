"""The version: here and not only in the metadata of an installed package, so that a plain checkout
runs too."""

__version__ = "0.1.0"
