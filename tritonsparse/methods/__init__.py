"""The registry: one small file a method, one row a method here."""

from __future__ import annotations

from .acdc import ACDC
from .base import Densities, Method
from .dense import Dense
from .dsr import DSR
from .dst import DST
from .gmp import GMP
from .mest import MEST
from .optg import OptG
from .phases import PHASES, Phases
from .powerprop import PowerProp
from .rigl_set import SET, RigL
from .snfs import SNFS
from .static import Static
from .str_autosparse import STR, AutoSparse, AutoTune
from .swat import SWAT
from .topkast import TopKAST

__all__ = [
    "ACDC",
    "DSR",
    "DST",
    "GMP",
    "MEST",
    "METHODS",
    "PHASES",
    "SET",
    "SNFS",
    "STR",
    "SWAT",
    "AutoSparse",
    "AutoTune",
    "Dense",
    "Densities",
    "Method",
    "OptG",
    "Phases",
    "PowerProp",
    "RigL",
    "Static",
    "TopKAST",
]

METHODS: dict[str, type[Method]] = {
    "acdc": ACDC,
    "autosparse": AutoSparse,
    "dense": Dense,
    "dsr": DSR,
    "dst": DST,
    "gmp": GMP,
    "mest": MEST,
    "optg": OptG,
    "powerprop": PowerProp,
    "rigl": RigL,
    "set": SET,
    "snfs": SNFS,
    "static": Static,
    "str": STR,
    "swat": SWAT,
    "topkast": TopKAST,
}
