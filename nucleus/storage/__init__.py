"""Objects in a bucket of any S3-compatible server, and files on disk."""
