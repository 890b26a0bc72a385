"""`python -m nucleus`: the command line, also of a submitted job."""

from nucleus.cli.main import main

main()
