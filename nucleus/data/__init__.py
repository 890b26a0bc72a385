"""From microscope images and masks to sharded, versioned datasets in a bucket, and from there to batches."""
