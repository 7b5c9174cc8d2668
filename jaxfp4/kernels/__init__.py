"""Pallas kernels for GPUs, each with the results of the plain JAX functions of the layer above, bit for bit."""
