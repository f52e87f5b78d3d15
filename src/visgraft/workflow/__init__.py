"""What the command line's verbs do, as functions: from labelled images to an adapter, and from there on.

Each returns a dictionary of plain JSON values.
"""

from visgraft.workflow.describing import describe_methods, reopen_plain
from visgraft.workflow.forecasting import forecast_folder
from visgraft.workflow.measuring import adapter_bytes, eval_adapter, measure_adapter, merge_adapter
from visgraft.workflow.training import train_folder

__all__ = [
    "adapter_bytes",
    "describe_methods",
    "eval_adapter",
    "forecast_folder",
    "measure_adapter",
    "merge_adapter",
    "reopen_plain",
    "train_folder",
]
