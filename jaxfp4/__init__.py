"""NVFP4 post-training quantization for JAX and Flax models whose parameters live sharded on a mesh."""
