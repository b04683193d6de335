"""The figures of evaluations."""
import numpy as np

from ..report import axes


def save(figure, path):
    """Writes the figure and closes it."""
    import matplotlib.pyplot as plt
    figure.savefig(path)
    plt.close(figure)


def radar(models):
    """{model: {category: score or None}} as polygons, from 0 to 10."""
    axes(1)  # no display
    import matplotlib.pyplot as plt
    plt.close()
    names = list(dict.fromkeys(c for scores in models.values() for c in scores))
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure, ax = plt.subplots(figsize=(6, 5), subplot_kw={"projection": "polar"}, layout="constrained")
    for model, scores in models.items():
        values = [np.nan if scores.get(name) is None else scores[name] for name in names]
        ax.plot([*angles, *angles[:1]], [*values, *values[:1]], marker="o", label=model)
        ax.fill(angles, np.nan_to_num(values), alpha=0.08)
    ax.set_xticks(angles, names)
    ax.set_ylim(0, 10)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def heat_maps(tables):
    """{title: {length: {depth: share}}} as maps of depth against length, green for all and red for none."""
    figure, (row,) = axes(len(tables))
    for ax, (title, table) in zip(row, tables.items()):
        lengths, depths = list(table), list(next(iter(table.values())))
        values = np.array([[table[n][d] for n in lengths] for d in depths])
        shown = ax.imshow(values, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        ax.set(title=title, xlabel="length (tokens)", ylabel="depth (%)")
        ax.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45)
        ax.set_yticks(range(len(depths)), [f"{100 * float(d):.0f}" for d in depths])
        for (y, x), value in np.ndenumerate(values):
            ax.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7)
    figure.colorbar(shown, ax=row[-1])
    return figure


def lines(panels):
    """{title: (x label, y label, {model: (xs, ys)})}, a panel each."""
    figure, (row,) = axes(len(panels))
    for ax, (title, (x, y, curves)) in zip(row, panels.items()):
        for label, (xs, ys) in curves.items():
            ax.plot(xs, ys, marker=".", label=label)
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.set_xscale("log", base=2)
        ax.legend()
    return figure


def histograms(models, ylabel="items"):
    """{model: {way: {letter: count}}} as bars, a panel a model."""
    figure, (row,) = axes(len(models))
    for ax, (model, ways) in zip(row, models.items()):
        letters = list(dict.fromkeys(letter for counts in ways.values() for letter in counts))
        for i, (way, counts) in enumerate(ways.items()):
            ax.bar(np.arange(len(letters)) + (i - (len(ways) - 1) / 2) * 0.8 / len(ways), [counts.get(letter, 0) for letter in letters], 0.8 / len(ways), label=way)
        ax.set_xticks(range(len(letters)), letters)
        ax.set(title=model, ylabel=ylabel)
        ax.legend()
    return figure
