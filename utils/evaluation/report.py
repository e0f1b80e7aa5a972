"""The page of an experiment's results, report.html: figures, pictures, and how they came about.

It needs no file beside it: pictures are in it, and it has no scripts. The newest result comes
first. Sections between two marks are kept as they are when a result is added.
"""

import base64
import html
import re

from utils.files import whole_file

BEGIN, END = "<!-- result {} -->", "<!-- end of the result -->"
SECTION = re.compile(f"{BEGIN.format('([0-9a-f]+)')}\n.*?{END}\n", re.DOTALL)
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: 1em 0 }}
h2 {{ margin: 0 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td {{ padding: 2px 2em 2px 0; border-bottom: 1px solid #eee; vertical-align: top }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
figure {{ margin: 1em 0 }}
img {{ max-width: 100%; border: 1px solid #ccc }}
code, details td {{ font: 13px monospace; overflow-wrap: anywhere }}
.small, figcaption {{ color: #666 }}
</style>
</head>
<body>
<h1>{title}</h1>
"""
TAIL = "</body>\n</html>\n"


def add_result(path, key, name, figures, pictures, manifest, on_warning):
    """Add a result to the page `path`, or replace that of the same `key`, a hash.

    `figures` is a dict of strings, `pictures` a list of (caption, path of a PNG file), `manifest` a
    dict. A file that is no such page is moved aside with a warning. Raises DiskError where the disk
    does not take the page, and the old one stays.
    """
    older = read_sections(path, on_warning)
    older.pop(key, None)
    mark = BEGIN.format(key)
    sections = [f"{mark}\n{section(name, figures, pictures, manifest)}{END}\n", *older.values()]
    page = HEAD.format(title=html.escape(f"Results of {path.parent.name}"))
    with whole_file(path) as file:
        file.write((page + "".join(sections) + TAIL).encode(errors="backslashreplace"))


def read_sections(path, on_warning):
    """{key: section} of the page `path`; empty where there is none."""
    if not path.exists():
        return {}
    content = path.read_text(encoding="utf-8", errors="replace")
    found = {match[1]: match[0] for match in SECTION.finditer(content)}
    if not found:
        aside = path.with_name("report_old.html")
        path.replace(aside)
        on_warning(f"{path} held no results and is now {aside}")
    return found


def section(name, figures, pictures, manifest):
    """One result as HTML."""
    rows = "".join(
        f"<tr><td>{html.escape(figure)}</td><td class='number'>{html.escape(value)}</td></tr>\n"
        for figure, value in figures.items()
    )
    facts = "".join(
        f"<tr><td>{html.escape(fact)}</td><td>{html.escape(str(value))}</td></tr>\n"
        for fact, value in flat(manifest)
    )
    when = f"{manifest['time']}, {manifest['seconds']:g} seconds on {manifest['device']}"
    return "".join([
        f"<section>\n<h2>{html.escape(name)}</h2>\n<p class='small'>{html.escape(when)}<br>\n",
        f"<code>{html.escape(manifest['command'])}</code></p>\n",
        *[figure_of(caption, path) for caption, path in pictures],
        f"<table>\n{rows}</table>\n" if rows else "",
        f"<details>\n<summary>How it came about</summary>\n<table>\n{facts}</table>\n</details>\n",
        "</section>\n",
    ])


def figure_of(caption, path):
    """A PNG file as HTML that holds it."""
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    return (f"<figure>\n<img src='{source}' alt='{caption}'>\n<figcaption>{caption}</figcaption>\n"
            "</figure>\n")


def flat(values, prefix=""):
    """(name, value) of a dict of dicts, the names joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
