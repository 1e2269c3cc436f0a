"""`python -m lookahead_decoding` is the `lookahead` command."""

from .cli.main import main

main()
