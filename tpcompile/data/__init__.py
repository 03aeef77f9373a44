"""Samples: what an engine is calibrated, proved and timed on."""
