"""Hook of mkdocs: pages of the site that lie outside of docs/, parts of README, and links."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("cluster/README.md", "launch/recipes/README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files, *, config):
    """Add PAGES at the paths that they have in the repository."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def _of_readme(name: str) -> str:
    """What stands in README between <!-- name --> and <!-- /name -->, as a page of docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found = text.split(f"<!-- {name} -->\n")
    part, _ = found.split(f"<!-- /{name} -->")
    return re.sub(r"\]\((docs/)?", lambda link: "](" if link[1] else "](../", part)


def on_page_markdown(markdown, *, page, **_):
    """Parts of README are put in. Links that are right in the repository are made right on the
    site; links to files that are no pages, as those of recipes, become their text."""
    name = page.file.src_uri
    markdown = re.sub(r"<!-- README: (\w+) -->", lambda m: _of_readme(m[1]), markdown)
    home = ROOT / name if name in PAGES else ROOT / "docs" / name

    def here(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = (home.parent / target).resolve()
        if not target or not path.is_relative_to(ROOT) or not path.exists():
            return link[0]
        if path.is_dir():
            path /= "index.html"
        inside = path.relative_to(ROOT).as_posix()
        if inside not in PAGES and not (inside.startswith("docs/") and path.exists()):
            return text
        up = "../" * name.count("/")
        return f"[{text}]({up}{inside.removeprefix('docs/')}{anchor})"

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)#:]*)(#[^)]*)?\)", here, markdown)
