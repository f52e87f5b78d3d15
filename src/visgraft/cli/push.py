"""`visgraft push`: publish an adapter on the Hugging Face hub."""

from typing import Annotated

import typer

from visgraft.cli.arguments import AdapterFolder, Json


def push(
    adapter: AdapterFolder,
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="repository of the hub, created if need be", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="create a repository that only its owner sees")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="branch, created if need be; none: the main one")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="of the commit; none: method, backbone")] = None,
    json: Json = False,
) -> None:
    """Publish an adapter on the Hugging Face hub, with its model card."""
    from visgraft.adapters.publish import push as publish
    from visgraft.cli.show import emit, result_console
    from visgraft.cli.text import command_line
    from visgraft.files import HUB_PREFIX

    url = publish(adapter, repository, private=private, revision=revision, message=message)
    name = f"{HUB_PREFIX}{repository.removeprefix(HUB_PREFIX)}{'' if revision is None else f'@{revision}'}"
    again = command_line("visgraft", "predict", name, "photos")

    def text() -> None:
        result_console.print(f"{url}\nname the classes of images with it:\n  {again}")

    emit({"adapter": name, "url": url, "command": again}, json, text)
