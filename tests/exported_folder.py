"""Read an exported folder in a process that does not know this package."""

import json

from commands import run_without


def json_printed_by(script, folder, tmp_path, *, packages=("iiet", "orchestrator")):
    """Return the JSON in the last line of a script that gets the folder and a folder for a copy."""
    printed = run_without(packages, script, str(folder), str(tmp_path / "copy"), folder=tmp_path)
    return json.loads(printed.splitlines()[-1])
