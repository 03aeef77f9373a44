"""What people look at: the page of a bundle, the page of a folder of bundles, and what they draw."""
