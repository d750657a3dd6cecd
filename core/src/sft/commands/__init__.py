"""The commands of `sft`: cli.py is the command line, and each command is a file of its own."""
