"""A fresh process for edge.py: it imports no more than it needs, does one thing, and says how much memory that took.

python benchmarks/edge_child.py onnx model.onnx          # also torch, timm and openvino: answer one picture
python benchmarks/edge_child.py train DATA --out ...     # what `visgraft train` does
"""

import json
import sys
from pathlib import Path
from typing import Any

SIDE = 224


def peak() -> int:
    """Return the largest resident set of this process so far, in bytes.

    Not `ru_maxrss`: on Linux a process inherits that of the one which started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def by_onnx(file: str) -> int:
    """Answer by onnxruntime alone; returns the peak before the model was opened."""
    import numpy as np
    import onnxruntime

    options, before = onnxruntime.SessionOptions(), peak()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    session.run(None, {"pixels": np.zeros((1, 3, SIDE, SIDE), np.float32)})
    return before


def by_openvino(file: str) -> int:
    """Answer by OpenVINO alone, in float32; returns the peak before the model was opened."""
    import numpy as np

    hidden: Any = None  # what would report the import to its maker
    sys.modules["openvino_telemetry"] = hidden
    import openvino

    before = peak()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    openvino.compile_model(file, "CPU", config)(np.zeros((1, 3, SIDE, SIDE), np.float32))
    return before


def by_torch(file: str) -> int:
    """Answer by a torch.export program; returns the peak before it was opened."""
    import torch

    torch.set_num_threads(1)
    before = peak()
    with torch.inference_mode():
        torch.export.load(file).module()(torch.zeros(1, 3, SIDE, SIDE))
    return before


def by_timm(folder: str) -> int:
    """Answer by eager torch and timm; returns the peak before the model was opened."""
    import timm
    import torch

    torch.set_num_threads(1)
    before = peak()
    with torch.inference_mode():
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(torch.zeros(1, 3, SIDE, SIDE))
    return before


def by_training(*arguments: str) -> int:
    """Do what `visgraft train` does, which prints its result; returns the peak before that."""
    from visgraft.cli import main

    before = peak()
    sys.argv = ["visgraft", "train", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    return before


if __name__ == "__main__":
    kinds = {"onnx": by_onnx, "openvino": by_openvino, "torch": by_torch, "timm": by_timm, "train": by_training}
    begun_at = kinds[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"before": begun_at, "peak": peak()}))
