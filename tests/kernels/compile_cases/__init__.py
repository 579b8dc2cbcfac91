"""Which specialisations of which kernels `compile_kernels.py` compiles."""
