"""`python -m unified_edit`: the same as the command `unified-edit`."""

from unified_edit.cli import main

if __name__ == "__main__":
    main()
