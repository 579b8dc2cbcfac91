"""Convolutions with the effective weight inside, and over kept blocks of channels."""
