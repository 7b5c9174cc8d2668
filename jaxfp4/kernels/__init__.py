"""Pallas kernels for GPUs, on plain arrays; each has a plain form in JAX that callers use elsewhere."""
