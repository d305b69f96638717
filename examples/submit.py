"""Start a run on the cluster that this script runs on.

    ray submit cluster.yaml examples/submit.py --config examples/dolly_flex.yaml [KEY=VALUE ...]

`ray submit` copies this file to the home of the head and runs it there; the repository lies in ~/fedgraft (file_mounts), so a
configuration is looked up there where it is not found from the current directory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fedgraft.cli import app

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a configuration of fedgraft run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of it to replace")
    arguments = parser.parse_args()
    if not Path(arguments.config).is_file():
        os.chdir(Path.home() / "fedgraft")
    address = os.environ.get("RAY_ADDRESS", "auto")
    sys.argv = ["fedgraft", "run", arguments.config, f"executor.address={address}", *arguments.overrides]
    app()
