"""The HTTP server: OpenAI's API over `qjax.engine.async_engine`. Imports neither jax nor kernels."""
