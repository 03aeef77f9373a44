"""Is the engine faster, and where does the time go: ``bench``."""
