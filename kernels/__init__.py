"""Triton kernels and their PyTorch references, imported as `tritonsparse.kernels.<module>`.

This file stays without imports: seen from the repository root it bears the name of the Hugging Face
package `kernels`, which transformers probes for.
"""
