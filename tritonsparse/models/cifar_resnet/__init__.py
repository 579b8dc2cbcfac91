"""Residual networks for small images: `AutoModelForImageClassification` builds and loads them once this is imported.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageClassification

from .configuration import CifarResNetConfig
from .modeling import CifarResNetForImageClassification

__all__ = ["CifarResNetConfig", "CifarResNetForImageClassification"]

AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
