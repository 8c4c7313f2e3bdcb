"""Fused kernels for the memory-bound parts of a step, on CUDA and, by the same arithmetic, on CPU; plain torch stays as the reference.

A floor between parallel/ (which sends numbers between ranks) and algorithm/ (which defines what is computed). The key
``kernels=auto|fused|reference`` chooses; ``python -m megatron_rema.kernels`` prints what there is. Importing the package loads
neither torch nor a library.
"""
