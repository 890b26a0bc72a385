"""What one worker does in training; `job` decides where the workers run."""
