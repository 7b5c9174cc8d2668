"""Eight virtual CPU devices for the whole run, set once, before any backend starts."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

# It needs Model-Optimizer, which no test does.
collect_ignore = ["golden/make_modelopt_algorithms.py"]
