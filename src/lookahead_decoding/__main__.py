"""`python -m lookahead_decoding` is the `lookahead` command."""

from .cli import main

main()
