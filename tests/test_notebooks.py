"""The notebooks run from top to bottom, with this interpreter; the outputs that they are kept with hold no trace of a machine."""
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
import nbformat  # noqa: E402
from jupyter_client import AsyncKernelManager  # noqa: E402
from jupyter_client.kernelspec import KernelSpecManager  # noqa: E402

TRACES = re.compile(r"/tmp/|/home/|/root/|/Users/|\d\d:\d\d:\d\d|\"stderr\"")
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom and keep the outputs"
    assert not TRACES.search(path.read_text()), "outputs with a path, a time or a warning"
    kernels = KernelSpecManager(kernel_dirs=[])  # no other than this interpreter's own
    fresh = nbclient.NotebookClient(nbformat.from_dict(kept), timeout=180, resources={"metadata": {"path": str(path.parent)}},
                                    km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)).execute()
    assert shown(fresh) == shown(kept)


def shown(notebook):
    """Which forms of output each cell of code has; what it prints is left out, a library may warn."""
    return [[sorted(output["data"]) for output in cell.outputs if "data" in output] for cell in notebook.cells if cell.cell_type == "code"]
