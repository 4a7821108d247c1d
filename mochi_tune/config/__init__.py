"""The settings of a run: their schema, and loading and checking them."""
