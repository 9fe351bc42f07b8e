"""Recipes of fp8, which nothing here uses."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
