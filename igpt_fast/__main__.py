"""`python -m igpt_fast` is `igpt-fast`."""

from igpt_fast.cli import main

main()
