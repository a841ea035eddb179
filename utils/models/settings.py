"""The settings that a trained model is used with: those of the run that made it."""

import json
import os
from pathlib import Path


def saved_arguments(folder: str | os.PathLike) -> dict:
    """The flags of the run that wrote a folder, by name; empty where no script of this project wrote it."""
    try:
        found = json.loads((Path(folder) / "arguments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
