"""Runs a script on an exported folder in a process that has only installed packages."""

import json
import os
import subprocess
import sys


def json_printed_by(script, folder, tmp_path):
    """Return the JSON in the last line of a script that gets the folder and a folder for a copy."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "copy")],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
