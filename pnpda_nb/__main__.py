"""`python -m pnpda_nb` is the command line, which appendix G describes."""

from pnpda_nb.cli import main

if __name__ == "__main__":
    main()
