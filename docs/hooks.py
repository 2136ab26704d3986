"""What the site takes from elsewhere in the repository: the picture of the first page."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_PICTURE = Path(__file__).parents[1] / "scenarios" / "first_leak.png"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the picture, under its own name beside the first page."""
    files.append(File.generated(config, _PICTURE.name, abs_src_path=str(_PICTURE)))
    return files
