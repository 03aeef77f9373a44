"""Where two sides part: ``bisect`` and ``diff``."""
