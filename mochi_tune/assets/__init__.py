"""Files shipped with the package: the tiny model and the demo clip."""
