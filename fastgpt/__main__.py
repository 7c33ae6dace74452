"""`python -m fastgpt`: the command line without an installed script."""

from fastgpt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
