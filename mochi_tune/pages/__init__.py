"""Self-contained HTML pages: style, head, charts, and screenshots by a browser."""
