"""Give MkDocs the generated pages. ``mkdocs.yml`` names this file under ``hooks``.

The pages exist only in the build, so a new method gets its page without an edit of any other file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

from doc_pages import API, generate_pages, group_methods_by_family  # noqa: E402

PAGES = generate_pages()
LOADED = re.compile(r'src="https?://[^"]*"|<link[^>]*rel="stylesheet"[^>]*href="https?://[^"]*"')


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation, below the entries ``Methods`` and ``API``."""
    methods: list[Any] = ["methods/index.md"]
    for family, names in group_methods_by_family().items():
        methods.append({family: [{name: f"methods/{name}.md"} for name in names]})
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


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Stop the build if a page would load a script, a style sheet or an image from another host."""
    from mkdocs.exceptions import PluginError

    found = LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output
