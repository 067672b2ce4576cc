"""`python -m igpt_fast.cli` is `igpt-fast`."""

from igpt_fast.cli import main

main()
