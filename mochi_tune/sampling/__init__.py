"""Rendering videos from prompts: requests, the sampler, rendering and video files."""
