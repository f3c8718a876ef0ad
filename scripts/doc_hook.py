"""Give MkDocs the generated pages. ``mkdocs.yml`` names this file under ``hooks``.

The pages exist only in the build, so a new method gets its page without an edit of any other file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

from doc_pages import API, generated_pages  # noqa: E402  # this folder is on the path from here on

PAGES = generated_pages()


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation, below the entries ``Methods`` and ``API``."""
    methods: list[Any] = ["methods/index.md"]
    for path in PAGES:
        if path.startswith("methods/") and path not in methods:
            methods.append({Path(path).stem: path})
    api = []
    for name, (title, _) in API.items():
        api.append({title: f"api/{name}.md"})
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = methods
        if "API" in entry:
            entry["API"] = api
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    for path, text in PAGES.items():
        files.append(File.generated(config, path, content=text))
    return files
