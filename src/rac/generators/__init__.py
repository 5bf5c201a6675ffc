"""Generators: label and noise -> latents, which a coder decodes to images."""
