"""What a user can set: names and recipes."""
