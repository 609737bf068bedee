"""`python -m service` is `detot`."""

from service.cli import main

main()
