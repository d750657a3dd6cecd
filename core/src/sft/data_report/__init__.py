"""What ``sft data`` says before a run: gathered in one pass over the data, as a run reads it (gather.py), into one
value (value.py), which the terminal, a page and ``--json`` show."""
