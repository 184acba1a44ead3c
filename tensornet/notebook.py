"""Small HTML tables for notebooks: no scripts, no requests, text escaped."""

from collections.abc import Iterable, Sequence
from html import escape

#: Rows of a table that are shown; a model has hundreds of layers.
ROWS = 40


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as HTML, with at most `ROWS` rows and a count of the others.

    Args:
        caption: line above the table.
        header: names of the columns.
        rows: cells, converted by `str`.

    Example:
        >>> from tensornet.notebook import html_table
        >>> html_table("a < b", ["x"], [[1]])
        '<p>a &lt; b</p><table><thead><tr><th>x</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
    """
    lines = [[escape(str(cell)) for cell in row] for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines[:ROWS])
    more = f"<p>and {len(lines) - ROWS} more</p>" if len(lines) > ROWS else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p>{escape(caption)}</p>{table}{more}"
