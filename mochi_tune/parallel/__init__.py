"""Functions that save memory or use several processes; the models need no code for them."""
