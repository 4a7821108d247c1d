"""The story that makes the cache: everything that needs raw video or a frozen encoder."""
