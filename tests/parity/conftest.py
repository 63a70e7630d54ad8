"""Four simulated devices for the comparisons that shard; it must come before JAX computes."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
