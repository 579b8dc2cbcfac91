"""Names of the first edition."""

from __future__ import annotations

from .text.translation_presets import PRESETS, build_model, load_model

__all__ = ["PRESETS", "build_model", "load_model"]
