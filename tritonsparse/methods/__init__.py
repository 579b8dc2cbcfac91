"""The registry: one small file a method, one row a method here."""

from __future__ import annotations

from .acdc import ACDC, PHASES, Phases
from .base import Densities, Method
from .dense import Dense
from .gmp import GMP
from .mest import MEST
from .rigl_set import SET, RigL
from .static import Static
from .str_autosparse import STR, AutoSparse, AutoTune
from .topkast import TopKAST

__all__ = [
    "ACDC",
    "GMP",
    "MEST",
    "METHODS",
    "PHASES",
    "SET",
    "STR",
    "AutoSparse",
    "AutoTune",
    "Dense",
    "Densities",
    "Method",
    "Phases",
    "RigL",
    "Static",
    "TopKAST",
]

METHODS: dict[str, type[Method]] = {
    "acdc": ACDC,
    "autosparse": AutoSparse,
    "dense": Dense,
    "gmp": GMP,
    "mest": MEST,
    "rigl": RigL,
    "set": SET,
    "static": Static,
    "str": STR,
    "topkast": TopKAST,
}
