"""`jaxfp4 bench kernels`: array functions checked, then timed beside a plain copy, plain jnp and other libraries."""
