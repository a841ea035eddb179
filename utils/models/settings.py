"""The settings that using a trained model needs, in a file beside its weights: how to rank, read and write."""

import json
import os
from pathlib import Path

from utils.files import write_json

FILE = "settings.json"


def write_settings(folder: str | os.PathLike, args, names: tuple[str, ...]) -> None:
    """Writes the flags `names` into a model's folder."""
    write_json(Path(folder) / FILE, {name: getattr(args, name) for name in names})


def saved_settings(folder: str | os.PathLike) -> dict:
    """The settings of a model's folder, by name; empty if no script of this project trained it."""
    try:
        found = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
