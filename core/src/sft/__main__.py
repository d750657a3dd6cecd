"""``python -m sft``: the command line, where the console script is not on the path."""

from sft.commands.cli import main

if __name__ == "__main__":
    main()
