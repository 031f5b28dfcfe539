"""`python -m pnpda_nb` is the command line, which chapter 92 describes."""

from pnpda_nb.cli import main

if __name__ == "__main__":
    main()
