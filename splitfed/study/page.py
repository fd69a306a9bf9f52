"""A self-contained HTML page: its style sheet, and the few elements that a report is made of.

Text that comes in as ``str`` is escaped; only ``Html`` goes into the page as it is.
"""

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Markup, which goes into a page as it is."""


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a2230; --muted: #5c6678; --line: #e1e5eb;
  --first: #2563c9; --second: #c2570c; --good: #17794a; --warn-ink: #7a4a00; --warn: #fdf3e0; --warn-line: #efd9ac;
  --shade: #1a223026;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --ink: #e7ebf2; --muted: #9aa6b8; --line: #2c3543;
    --first: #74a7f7; --second: #f0a05a; --good: #5fce97; --warn-ink: #f3cd86; --warn: #2c2415; --warn-line: #55441f;
    --shade: #00000080;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 56px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 0 0 12px; }
.eyebrow, .note, figcaption, dt { color: var(--muted); }
.eyebrow { font-size: 14px; margin: 0; }
.note, figcaption { font-size: 14px; max-width: 76ch; }
header .note { max-width: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin-top: 18px; }
section > :last-child { margin-bottom: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 0; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tiles dt { font-size: 14px; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 24px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles .detail { font-size: 14px; color: var(--muted); }
.tiles .wide { grid-column: 1 / -1; display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; margin: 0; }
.tiles .wide .value { font-size: 19px; }
.tiles > .warning { background: var(--warn); border-color: var(--warn-line); }
.warning dt, .warning .detail { color: inherit !important; }
.good { color: var(--good); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 24px; }
figure { margin: 0; min-width: 0; max-width: 540px; }
figure h3, .sample h3 { font-size: 15px; margin: 0 0 6px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll {  /* a shadow at the right edge where there is more to scroll to */
  overflow-x: auto; margin: 12px -24px; padding: 0 24px;
  background: linear-gradient(to left, var(--card) 40%, transparent) right / 48px 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll;
}
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
th:first-child, td:first-child { text-align: left; }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.long { display: inline-block; min-width: 16em; max-width: 28em; white-space: normal; text-align: left; }
.told td:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
.told td:nth-child(2), .told th:nth-child(2) { text-align: left; }
.told th:last-child { text-align: left; }
section > h3 { font-size: 15px; margin: 18px 0 -6px; font-weight: 600; }
.warning p { margin: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: 14px; vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.absent { color: var(--muted); }
.warning { background: var(--warn); color: var(--warn-ink); border: 1px solid var(--warn-line); border-radius: 8px;
  padding: 10px 14px; margin: 12px 0; font-size: 15px; }
pre { margin: 0; padding: 14px 16px; background: var(--page); border: 1px solid var(--line); border-radius: 8px;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { min-width: 0; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details > summary { cursor: pointer; font-weight: 500; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); gap: 8px 40px; }
.settings h3 { font-size: 14px; font-weight: 600; margin: 14px 0 4px; }
.settings table { font-size: 14px; table-layout: fixed; }
.settings .scroll { margin: 0; padding: 0; }
.settings td, .settings th { padding-top: 4px; padding-bottom: 4px; font-weight: 400; white-space: normal; }
.settings td { overflow-wrap: anywhere; }
.settings th { color: var(--muted); width: 58%; }
footer { color: var(--muted); font-size: 14px; margin-top: 24px; }
@media (max-width: 560px) {
  main { padding: 24px 14px 40px; }
  h1 { font-size: 25px; }
  section { padding: 18px 16px; }
  .scroll { margin: 12px -16px; padding: 0 16px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tiles > div { padding: 12px 14px; }
  .tiles > :is(:first-child, :nth-child(4)) { grid-column: 1 / -1; }
  table { font-size: 14px; }
}
@media print { body { background: none; } section, .tiles > div { break-inside: avoid; } }
"""


def page(title: str, body: Iterable[Html]) -> Html:
    """Give a whole document that loads nothing from anywhere."""
    return Html(
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{join(body)}\n</main>\n</body>\n</html>\n"
    )


def join(parts: Iterable[Html]) -> Html:
    """Put parts below each other, leaving out empty ones."""
    return Html("\n".join(part for part in parts if part))


def element(tag: str, *content: str, kind: str = "") -> Html:
    """Give an element of the given tag and class; content that is not Html is escaped."""
    opening = f'<{tag} class="{kind}">' if kind else f"<{tag}>"
    return Html(f"{opening}{''.join(map(_markup, content))}</{tag}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> Html:
    """Give a table that scrolls by itself where the screen is narrow; each row's first cell names the row."""
    columns = "".join(f'<th scope="col">{_markup(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{_markup(first)}</th>{"".join(str(element("td", cell)) for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    content = Html(f"{top}<tbody>{''.join(lines)}</tbody>")
    return Html(f'<div class="scroll" tabindex="0">{element("table", content, kind=kind)}</div>')


def _markup(content: str) -> str:
    return content if isinstance(content, Html) else html.escape(content)
