"""The documentation site: built without a warning, no page left out, no link to nothing."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.needs("mkdocs")]

ROOT = Path(__file__).parents[2]


class Ids(HTMLParser):
    """`ids` of elements, `links` of anchors and `sources` of what a browser loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        name = {"script": "src", "img": "src", "link": "href"}.get(tag, "")
        if found.get(name):
            self.sources.append(found[name] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. `validation:` of mkdocs.yml makes links, anchors and pages without a place in
    `nav` warnings, and --strict makes warnings errors (not with -q, which counts none)."""
    folder = tmp_path_factory.mktemp("site") / "built"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_every_public_name(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in site.glob("*.html")} - {
        "404",
        "CONTRIBUTING",
        "CHANGELOG",
    }
    from dist_looksam import __all__

    ids = Ids((site / "api.html").read_text()).ids
    assert {*__all__} <= {name.rpartition(".")[2] for name in ids}


def test_every_link_and_anchor_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    """Also of pages that lie outside of docs/ and of README's parts, whose links a hook changes.
    The picture of the 64k point was missing: a link to a file that is left out is no warning."""
    reports = site / "scaling"  # pages of `dist-looksam report`
    found = [path for path in site.rglob("*.html") if reports not in path.parents]
    known = {path: Ids(path.read_text()) for path in found}
    for path, page in known.items():
        if path.name == "404.html":  # its links are absolute
            continue
        assert not [url for url in page.sources if re.match(r"(https?:)?//", url)], path
        for source in page.sources:
            assert (path.parent / source).exists(), f"{path.name}: {source}"
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor and target in known:
                assert anchor in known[target].ids, f"{path.name}: {link}"


def test_the_methods_of_readme_are_on_the_site(site):
    text = (site / "methods.html").read_text()
    assert "<code>look_layer_sam</code>" in text and "<!-- README" not in text
    assert "gpt.py" in (site / "loop.html").read_text()
