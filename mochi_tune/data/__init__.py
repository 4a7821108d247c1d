"""The cache of prepared clips: its on-disk contract, reading it, and the order in which it is read."""
