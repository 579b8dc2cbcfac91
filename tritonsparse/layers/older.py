"""Pickled layers of version 0.1, whose 28 attributes are objects today."""

from __future__ import annotations

from typing import Any

from ..pattern import NM, Block, Unstructured
from .backend import Backend
from .sparse_input import SparseInput

__all__ = ["from_older"]

# What is made anew, or was of one forward.
_DROPPED = (
    *("w_hat", "w_hat_versions", "defer", "block_index", "grad_index", "input_index", "block_flags", "index_versions"),
    *("last_cutoff", "last_overflow"),
)


def from_older(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a pickled layer as they are named today; those of today's as they are."""
    if "mask" in state:
        # An attribute then, a buffer today.
        buffers = {**state["_buffers"], "mask": state["mask"]}
        state = {name: value for name, value in state.items() if name != "mask"} | {"_buffers": buffers}
    if "backend_choice" not in state:
        return state
    state = {name: value for name, value in state.items() if name not in _DROPPED}
    block, n_of_m = state.pop("block"), state.pop("n_of_m")
    state["pattern"] = n_of_m if isinstance(n_of_m, NM) else Unstructured() if block is None else Block(*block)
    asked, reason = state.pop("backend_choice"), state.pop("backend_reason")
    state["backend"] = Backend(asked, state["backend"], reason, state.pop("sparse_grad_input", False))
    density, scope, slack = (state.pop(f"activation_{name}") for name in ("density", "scope", "slack"))
    sparse = SparseInput(
        1.0 if density is None else density, scope, slack, state.pop("remembers_cutoff"),
        state.pop("activation_cutoff"), state.pop("row_masks"), overflows=state.pop("overflows"),
    )  # fmt: skip
    state["sparse_input"] = None if density is None else sparse
    return state | {"topology": None, "cache": None}
