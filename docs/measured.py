"""Hook of the site: the tables of `bench/results/` are pages of it, and so are CONTRIBUTING.md and CHANGELOG.md.

Pages of `docs/` link to them where they lie in the repository, so that the links hold in both places.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SHOWN = (".md", ".csv", ".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of `docs/`, and a page for each folder of results that lists its tables."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for path in sorted(each for each in RESULTS.rglob("*") if each.suffix in SHOWN):
        place = f"measured/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for folder in (RESULTS, *sorted(each for each in RESULTS.iterdir() if each.is_dir())):
        below = folder.relative_to(RESULTS).as_posix()
        place = posixpath.normpath(f"measured/{below}/index.md")
        files.append(File.generated(config, place, content=_listing(folder)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave `docs/` at the pages that were made of their files."""
    up = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")
    markdown = re.sub(r"(\]\()(?:\.\./)+bench/results/([^)#]*)", lambda m: m[1] + _place(up, m[2]), markdown)
    for name, target in PAGES.items():
        markdown = re.sub(rf"(\]\()(?:\.\./)+{re.escape(name)}", rf"\g<1>{up}/{target}", markdown)
    return markdown.replace(" ± ", "\u00a0±\u00a0")  # a mean and its deviation stay on one line


def _place(up: str, below: str) -> str:
    """Where a file or folder of `bench/results/` stands in the site."""
    return f"{up}/measured/{below}{'index.md' if below in ('', 'paper/') else ''}"


def _listing(folder: Path) -> str:
    """A page that names every table of a folder by its own title."""
    rows = ["# Tables as they were measured", "", "Each page says what it was made with.", ""]
    for path in sorted(folder.glob("*.md")):
        title = next((line[2:] for line in path.read_text("utf-8").splitlines() if line.startswith("# ")), "")
        rows.append(f"- [{path.stem}]({path.name}){': ' + title if title else ''}")
    rows += [f"- [{path.name}]({path.name}/index.md)" for path in sorted(folder.iterdir()) if path.is_dir()]
    return "\n".join([*rows, ""])
