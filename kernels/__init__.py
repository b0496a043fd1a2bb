"""Operations of the model that XLA alone does not do well: one folder an operation, each with a plain jnp reference."""
