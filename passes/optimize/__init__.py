"""What makes a program faster than the papers count: passes that keep every number and save work."""
