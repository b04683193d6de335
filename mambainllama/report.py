"""Pages that a run leaves: HTML in one file, with its figures inside."""
import base64
import html
import io

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}
td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:right;vertical-align:top}td:first-child,th:first-child{text-align:left}
img{width:100%}.text td{text-align:left;white-space:pre-wrap}"""


def page(title, *parts):
    """A whole page: title and parts, which are HTML."""
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "</html>\n")


def table(head, rows, style=""):
    """An HTML table of strings."""
    cells = ["<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
             for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return f'<table class="{style}">{"".join(cells)}</table>'


def axes(columns, height=4.2):
    """A matplotlib figure that needs no display, and its axes in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(5 * columns, height), layout="constrained", squeeze=False)


def image(figure, alt="curves"):
    """The figure, closed, as an HTML image."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{html.escape(alt)}">'
