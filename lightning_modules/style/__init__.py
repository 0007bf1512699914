"""Images learned from features, and networks that paint: inversion, texture, neural, fast and arbitrary style."""
