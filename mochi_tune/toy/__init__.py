"""The toy world: short clips that are drawn, described and measured without files or networks."""
