"""What `make site` asks of the site that it has built."""

from __future__ import annotations

from pathlib import Path

from check_site import faults

PAGE = '<html><body><p id="here"></p>{}</body></html>'


def test_links_lead_to_files_and_places_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    other = PAGE.format(
        '<a href="../first.html#here">1</a><a href="https://example.com/">2</a><img src="data:image/png,">'
    )
    (tmp_path / "en" / "other.html").write_text(other)
    (tmp_path / "first.html").write_text(PAGE.format('<a href="en/other.html">1</a><a href="#here">2</a>'))
    assert faults(tmp_path) == []
    wrong = '<a href="en/gone.html">1</a><a href="en/other.html#gone">2</a><script src="https://cdn.example.com/a.js">'
    (tmp_path / "wrong.html").write_text(PAGE.format(f"{wrong}</script>"))
    assert faults(tmp_path) == [
        "wrong.html links to en/gone.html, which is not there",
        "wrong.html links to en/other.html#gone, and the page has no such place",
        "wrong.html loads https://cdn.example.com/a.js",
    ]
