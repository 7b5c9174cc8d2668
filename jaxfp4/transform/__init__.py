"""Layer 2: walking a model's jaxpr to find weights, and evaluating it with hooks at their contractions."""
