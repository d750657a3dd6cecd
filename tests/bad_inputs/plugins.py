"""Plugins that are not there, do not go together, or are broken."""

from __future__ import annotations

import textwrap

from bad_inputs.case import Case, write


def installed(says: str, source: str, target: str = "broken:Broken", name: str = "broken", **settings: str) -> Case:
    """A distribution with one plugin, which is asked for; Python finds it in the folder ``site``."""
    info = "site/sft_test_broken-0.3.dist-info"
    changes = (
        write(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sft-test-broken\nVersion: 0.3\n"),
        write(f"{info}/entry_points.txt", f"[sft.plugins]\n{name} = {target}\n"),
        write("site/broken.py", textwrap.dedent(source)),
    )
    return Case(says, changes, {"plugin": name, **settings}, site="site")


def hooked(says: str, body: str, hook: str = "sft_check", arguments: str = "run") -> Case:
    """The plugin's ``hook`` does this."""
    return installed(
        says,
        f"""
        import sft

        class Broken(sft.Plugin):
            name = "broken"
            api_version = 1

            @sft.hookimpl
            def {hook}(self, {arguments}):
                {body}
        """,
    )


CASES = {
    "not installed": Case("Plugin lorra is not installed", settings={"plugin": "lorra"}),
    "no name but no:": Case("Plugin , which no: switches off, is not installed", settings={"plugin": "no:"}),
    "switched off and not installed": Case(
        "Plugin lorra, which no:lorra switches off, is not installed", settings={"plugin": "no:lorra"}
    ),
    "a name with a newline": Case("Plugin lo ra is not installed", settings={"plugin": "lo\nra"}),
    "a path for a name": Case("Plugin ../lora is not installed", settings={"plugin": "../lora"}),
    "two adapters": Case("Plugins vera", settings={"plugin": "lora,vera"}),
    "two quantizers": Case(
        "Plugins nf4 (sft-quant-nf4 0.1.0) and int8 (sft-quant-nf4 0.1.0) both provide sft_quantizer, which h",
        settings={"plugin": "lora,nf4,int8"},
    ),
    "a refinement without what it refines": Case(
        "Plugin pissa refines lora, which is not active", settings={"plugin": "pissa,no:lora"}
    ),
    "a list of numbers": Case(
        "plugin: expected a name or a list of names, got [1, 2]",
        (write("s.json", '{"plugin": [1, 2]}'),),
        typed=("run", "s.json", "--model_name_or_path", "model"),
    ),
    "an object": Case(
        "plugin: expected a name or a list of names, got {'lora': 1}",
        (write("s.json", '{"plugin": {"lora": 1}}'),),
        typed=("run", "s.json"),
    ),
    "cannot be imported": installed("Plugin broken of sft-test-broken 0.3 cannot be imported", "import no_such_module"),
    "its text is no Python": installed("Plugin broken of sft-test-broken 0.3 cannot be imported", "class Broken(:"),
    "its module has no such class": installed(
        "Plugin broken of sft-test-broken 0.3 cannot be imported", "", "broken:Nobody"
    ),
    "its module is not there": installed(
        "Plugin broken of sft-test-broken 0.3 cannot be imported", "", "nowhere:Broken"
    ),
    "its module ends Python": installed(
        "Plugin broken of sft-test-broken 0.3 cannot be imported", "import sys; sys.exit(3)"
    ),
    "no class": installed("Plugin broken of sft-test-broken 0.3 names itself None", "Broken = 3"),
    "no plugin": installed("Plugin broken of sft-test-broken 0.3 names itself None", "class Broken: pass"),
    "no name": installed(
        "Plugin broken of sft-test-broken 0.3 names itself None",
        "import sft\nclass Broken(sft.Plugin):\n    api_version = 1",
    ),
    "another name": installed(
        "Plugin broken of sft-test-broken 0.3 names itself 'x'",
        "import sft\nclass Broken(sft.Plugin):\n    name = 'x'\n    api_version = 1",
    ),
    "another version of the interface": installed(
        "Plugin broken", "import sft\nclass Broken(sft.Plugin):\n    name = 'broken'\n    api_version = 99"
    ),
    "options that are none": installed(
        "Plugin broken",
        "import sft\nclass Broken(sft.Plugin):\n    name = 'broken'\n    api_version = 1\n    Options = 3",
    ),
    "a hook that there is not": hooked("Plugin broken", "pass", "sft_chekc"),
    "refuses": hooked("The moon is not full", "raise sft.UsageError('The moon is not full; wait for it.')"),
}
