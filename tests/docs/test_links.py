"""Links between the pages lead somewhere, and every page and picture is reached from the README."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def links(page: Path) -> list[str]:
    """Where the links of ``page`` lead within the checkout."""
    return [target for target in LINK.findall(prose(page)) if not target.startswith(("http://", "https://"))]


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def reached() -> set[Path]:
    """Files that links lead to from the README on, through pages."""
    found, left = set[Path](), [PAGES[0]]
    while left:
        page = left.pop()
        for target in links(page):
            file = (page.parent / target.split("#")[0]).resolve() if target.split("#")[0] else page
            if file not in found:
                found.add(file)
                left += [file] if file.suffix == ".md" and file.exists() else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_and_picture_is_reached() -> None:
    there = {*PAGES[1:], *(ROOT / "docs/images").iterdir()}
    assert not there - reached() - {PAGES[0]}
