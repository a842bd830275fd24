"""`python -m lavita` is the `lavita` command."""

from lavita.cli import main

if __name__ == "__main__":
    main()
