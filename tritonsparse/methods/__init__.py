"""The registry: one small file a method, one row a method here."""

from __future__ import annotations

from .base import Densities, Method
from .dense import Dense
from .gmp import GMP
from .str_autosparse import STR, AutoSparse, AutoTune

__all__ = ["GMP", "METHODS", "STR", "AutoSparse", "AutoTune", "Dense", "Densities", "Method"]

METHODS: dict[str, type[Method]] = {
    "autosparse": AutoSparse,
    "dense": Dense,
    "gmp": GMP,
    "str": STR,
}
