"""Style: feature inversion, texture synthesis, and style transfer by optimization or by networks."""
