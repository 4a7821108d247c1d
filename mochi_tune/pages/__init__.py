"""HTML pages that need no network: their style and head, their charts, and pictures that a browser takes of them."""
