"""Pallas kernels for NVIDIA GPUs, behind functions that give the same results in plain JAX."""
