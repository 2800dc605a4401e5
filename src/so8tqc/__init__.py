"""Bake SO(8) rotation gates into transformer weights, and prove every step."""

from importlib.metadata import version

__version__ = version("so8tqc")
