"""From prompts to videos: requests, the sampler, rendering and video files."""
