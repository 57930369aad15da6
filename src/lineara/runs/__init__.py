"""What a training command is, for any task: run folders, checkpoints, comparisons."""

from importlib.util import find_spec

for _library in ("numpy", "lightning", "jsonargparse", "torchmetrics", "tqdm"):
    if find_spec(_library) is None:
        raise ImportError(
            f"lineara.runs needs {_library}, which is not installed; install it with: pip install 'lineara[train]'"
        )
