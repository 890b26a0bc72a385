"""The service on Ray: the same application as a deployment of Ray Serve, whose replicas follow the load."""
