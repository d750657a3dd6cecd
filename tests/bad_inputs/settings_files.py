"""Broken settings files: no file, no JSON, YAML or TOML, and values that only a file can have."""

from __future__ import annotations

from bad_inputs.case import Case, directory, link, nested, pipe, write
from bad_inputs.settings import ARGUMENTS

TOO_SMALL = "numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got 1e-320."


def in_file(says: str, name: str, content: bytes | str) -> Case:
    return Case(says, (write(name, content),), typed=("run", name, *ARGUMENTS))


CASES = {
    "file not there": Case("Settings file missing.json cannot be read", typed=("run", "missing.json", *ARGUMENTS)),
    "file that is a folder": Case(
        "Settings file s.json is no file that can be read, but a folder",
        (directory("s.json"),),
        typed=("run", "s.json", *ARGUMENTS),
    ),
    "file without end": Case(
        "Settings file s.json is no file that can be read, but a device",
        (link("s.json", "/dev/zero"),),
        typed=("run", "s.json", *ARGUMENTS),
    ),
    "YAML file without end": Case(
        "Settings file s.yaml is no file that can be read, but a device",
        (link("s.yaml", "/dev/zero"),),
        typed=("run", "s.yaml", *ARGUMENTS),
    ),
    "file that is a named pipe": Case(
        "Settings file s.json is no file that can be read, but a named pipe",
        (pipe("s.json"),),
        typed=("run", "s.json", *ARGUMENTS),
    ),
    "file of another kind": in_file("Settings file s.ini is none of .yaml, .json and .toml", "s.ini", "seed = 1"),
    "broken JSON": in_file("Settings file s.json is not valid JSON", "s.json", '{"seed": 1,\n}'),
    "empty JSON": in_file("Settings file s.json is not valid JSON", "s.json", ""),
    "JSON that is a list": in_file(
        "Settings file s.json must hold one object of names and values", "s.json", '["seed"]'
    ),
    "JSON that is null": in_file("Settings file s.json must hold one object of names and values", "s.json", "null"),
    "JSON that is not UTF-8": in_file("Settings file s.json is not UTF-8 text", "s.json", b'{"seed": "\xff"}'),
    "JSON nested 100,000 deep": in_file("Settings file s.json is not valid JSON", "s.json", f'{{"seed": {nested()}}}'),
    "JSON with a name twice": in_file("Setting seed is given twice", "s.json", '{"seed": 1, "seed": 2}'),
    "JSON with a number of 5,000 digits": in_file(
        "Settings file s.json is not valid JSON", "s.json", '{"max_steps": ' + "9" * 5000 + "}"
    ),
    "JSON with NaN": in_file(
        "learning_rate: expected a number of at least 0, got nan", "s.json", '{"learning_rate": NaN}'
    ),
    "JSON with 1e-320": in_file(f"learning_rate: {TOO_SMALL}", "s.json", '{"learning_rate": 1e-320}'),
    "YAML with 1.0e-320": in_file(
        f"learning_rate: {TOO_SMALL.replace('1e', '1.0e')}", "s.yaml", "learning_rate: 1.0e-320\n"
    ),
    "JSON with half of a surrogate pair": in_file(
        "tokenizer_name_or_path: 'a\\ud800' is not UTF-8 text", "s.json", '{"tokenizer_name_or_path": "a\\ud800"}'
    ),
    "JSON with an empty name": in_file("Unknown setting ''", "s.json", '{"": 1}'),
    "JSON with a name of 100,000 letters": in_file(
        "Unknown setting kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk",
        "s.json",
        '{"' + "k" * 100_000 + '": 1}',
    ),
    "JSON with a value of 100,000 letters": in_file(
        "seed: expected a whole number of at least 0 and at most 2147483647, got 'vvvvvvvvvvvvvvvvvvvvvvvvvvv",
        "s.json",
        '{"seed": "' + "v" * 100_000 + '"}',
    ),
    "broken YAML": in_file("Settings file s.yaml is not valid YAML", "s.yaml", "seed: [1\n"),
    "empty YAML": in_file("Settings file s.yaml must hold one object of names and values", "s.yaml", ""),
    "YAML that is text": in_file("Settings file s.yaml must hold one object of names and values", "s.yaml", "hello\n"),
    "YAML with a name twice": in_file("Setting seed is given twice", "s.yaml", "seed: 1\nseed: 2\n"),
    "YAML with a Python object": in_file(
        "Settings file s.yaml is not valid YAML", "s.yaml", "seed: !!python/object/apply:os.system ['true']\n"
    ),
    "YAML that is not UTF-8": in_file("Settings file s.yaml is not UTF-8 text", "s.yaml", b"seed: \xff\n"),
    "YAML with a control character": in_file(
        "Settings file s.yaml is not valid YAML", "s.yaml", "output_dir: a\x07b\n"
    ),
    "YAML nested 10,000 deep": in_file(
        "Settings file s.yaml is not valid YAML", "s.yaml", "seed: " + nested(10_000) + "\n"
    ),
    "YAML that grows without end": in_file(
        "seed: expected a whole number of at least 0 and at most 2147483647, got [[",
        "s.yaml",
        "seed:\n- &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
    ),
    "YAML with a list for a name": in_file("Settings file s.yaml is not valid YAML", "s.yaml", "? [a, b]\n: 1\n"),
    "YAML with a date for a number": in_file(
        "seed: expected a whole number of at least 0 and at most 2147483647, got datetime.date(2026, 1, 1)",
        "s.yaml",
        "seed: 2026-01-01\n",
    ),
    "YAML with a number for a name": in_file("Unknown setting 1", "s.yaml", "1: 2\n"),
    "broken TOML": in_file("Settings file s.toml is not valid TOML", "s.toml", "seed = [1\n"),
    "TOML with a name twice": in_file("Settings file s.toml is not valid TOML", "s.toml", "seed = 1\nseed = 2\n"),
    "TOML with a name twice, once in a table": in_file(
        "Setting a.b is given twice", "s.toml", '"a.b" = 1\n[a]\nb = 2\n'
    ),
    "TOML that is not UTF-8": in_file("Settings file s.toml is not UTF-8 text", "s.toml", b'output_dir = "\xff"\n'),
    "TOML with a table that is no plugin's": in_file(
        "Unknown setting training.seed", "s.toml", "[training]\nseed = 1\n"
    ),
    "TOML with a date for a number": in_file(
        "seed: expected a whole number of at least 0 and at most 2147483647, got datetime.date(2026, 1, 1)",
        "s.toml",
        "seed = 2026-01-01\n",
    ),
    "TOML with 1e-320": in_file(f"learning_rate: {TOO_SMALL}", "s.toml", "learning_rate = 1e-320\n"),
    "TOML nested 10,000 deep": in_file(
        "Settings file s.toml is not valid TOML", "s.toml", f"seed = {nested(10_000)}\n"
    ),
}
