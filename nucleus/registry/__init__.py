"""Versioned models, aliases and encoder weights in the bucket."""
