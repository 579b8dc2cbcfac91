"""Names of the first edition."""

from __future__ import annotations

from .text.subwords import train_byte_tokenizer, train_tokenizer

__all__ = ["train_byte_tokenizer", "train_tokenizer"]
