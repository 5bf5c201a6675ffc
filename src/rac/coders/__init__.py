"""Station 6: image <-> latent."""
