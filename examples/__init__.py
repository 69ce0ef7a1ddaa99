"""Examples; they import only the public surface of `muonclip_jax`."""
