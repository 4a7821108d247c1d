"""Data preparation: everything that reads raw video or runs a frozen encoder."""
