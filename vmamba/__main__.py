"""python -m vmamba: the program `vmamba`."""

from vmamba.commands import main

if __name__ == "__main__":
    main()
