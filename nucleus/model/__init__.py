"""The network, its targets and losses, its files, and what it makes of an image."""
