"""One package per problem: its data (files to batches), its task (loss, optimiser, schedule) and its metrics."""

from importlib.util import find_spec

for _library in ("numpy", "lightning", "jsonargparse", "torchmetrics", "tqdm"):
    if find_spec(_library) is None:
        raise ImportError(
            f"lineara.tasks needs {_library}, which is not installed; install it with: pip install 'lineara[train]'"
        )
