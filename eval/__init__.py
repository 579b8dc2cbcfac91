"""Measuring what a sparse model is worth: BLEU, tables and plots."""
