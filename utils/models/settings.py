"""The flags that a model was trained with."""

import json
import os
from pathlib import Path


def saved_arguments(folder: str | os.PathLike) -> dict:
    """Flags by name of the run that wrote `folder`; {} if no run of this project wrote it."""
    try:
        found = json.loads((Path(folder) / "arguments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
