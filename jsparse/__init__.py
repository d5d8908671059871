"""jsparse: sparse LLaMA models in JAX."""
