"""The command line: one module a group of commands, each importing what is heavy only when it runs."""
