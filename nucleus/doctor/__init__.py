"""What `nucleus doctor` looks at, but for Ray: each check finds one thing and names what puts it right."""
