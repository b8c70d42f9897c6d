"""The command line of hosting: the folder of a Space, and pushing it."""

from pathlib import Path

import typer

from lora_studio import space
from lora_studio.cli_shelf import AsJson, answer, say_step, token_of


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""

    @app.command("space", help="Write the folder of a Hugging Face Space with this studio, and push it where --deploy says so.")
    def make(
        target: str = typer.Argument(..., metavar="OUT", help="A folder that is not there yet."), *,
        hardware: str = typer.Option("cpu", help=f"What it runs on: {', '.join(space.HARDWARE)}."),
        open_to: str = typer.Option("owner", "--open", help="Who may use it: owner, or visitors who sign in."),
        title: str = typer.Option("LoRA Studio", help="What the Space is called."),
        deploy: str = typer.Option("", metavar="OWNER/NAME", help="Push it to this Space, which is made where it is not there."),
        public: bool = typer.Option(False, help="With --deploy: everybody may see the Space."),
        token_stdin: bool = typer.Option(False, "--token-stdin", help="Read the Hub token from standard input instead of the Hub's own login."),
        as_json: bool = AsJson,
    ):
        files = space.write(Path(target), hardware=hardware, open_to=open_to, title=title)
        value = {"folder": str(Path(target).expanduser().absolute()), "files": len(files), "address": ""}
        words = f"{len(files)} files are in {value['folder']}."
        if deploy:
            value["address"] = space.deploy(Path(target), deploy, hardware=hardware, open_to=open_to, private=not public, token=token_of(token_stdin), report=say_step)
            words += f" The Space is at {value['address']}."
        answer(value, as_json, words)
