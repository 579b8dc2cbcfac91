"""Names of the first edition."""

from __future__ import annotations

from .images.models import IMAGE_MODELS, build_model, load_model

__all__ = ["IMAGE_MODELS", "build_model", "load_model"]
