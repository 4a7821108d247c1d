"""The toy world, whose clips are drawn and measured by code, and the toy model, demo and experiments on it."""
