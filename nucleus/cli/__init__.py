"""Command line: one module per group of commands; heavy libraries are imported when a command needs them."""
