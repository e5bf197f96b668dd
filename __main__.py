"""`python -m clipress`."""

from clipress.cli import main

main()
