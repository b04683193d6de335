"""Pages that a run leaves: HTML in one file, with its figures inside."""
import base64
import html
import io
import json
from pathlib import Path

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


def curves(runs):
    """A figure of {title: a run's metrics.jsonl}, a panel each: loss, ce, kl, error and margin by step."""
    figure, (row,) = axes(len(runs))
    for axis, (title, history) in zip(row, runs.items()):
        lines = [json.loads(line) for line in Path(history).read_text().splitlines()]
        for key in ("loss", "ce", "kl", "error", "margin"):
            if any(key in line for line in lines):
                axis.plot([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line], label=key)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
    return figure


def image(figure, alt="curves"):
    """The figure, closed, as an HTML image."""
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(_drawn(figure, "svg")).decode()}" alt="{html.escape(alt)}">'


def png(figure):
    """The figure, closed, as the bytes of a PNG, which notebooks show (IPython.display.Image)."""
    return _drawn(figure, "png")


def _drawn(figure, form):
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=72)
    plt.close(figure)
    return file.getvalue()
