"""What the stand-ins share: each call is kept byte for byte, as one file in $STAND_IN_RECORDS."""

import json
import os
import sys
import time
from pathlib import Path


def record(name: str) -> None:
    """Keep arguments, environment and folder of this call."""
    call = {
        "arguments": [os.fsencode(argument).hex() for argument in sys.argv[1:]],
        "environment": {key.hex(): value.hex() for key, value in os.environb.items()},
        "folder": os.getcwd(),
    }
    folder = Path(os.environ["STAND_IN_RECORDS"])
    made = folder / f".{name}-{time.time_ns()}-{os.getpid()}"
    made.write_text(json.dumps(call))
    made.rename(folder / made.name[1:])


def setting(name: str, default: str = "") -> str:
    """What the test has set for the stand-ins."""
    return os.environ.get(f"STAND_IN_{name}", default)
