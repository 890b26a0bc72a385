"""Training runs in the bucket: what each is to do, what it left, and how runs compare."""
