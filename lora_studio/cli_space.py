"""The command line of hosting: the folder of a Space with this studio, or with a demo of an adapter, and pushing it."""

from pathlib import Path

import typer

from lora_studio import demo_space, library, shelf, space
from lora_studio.cli_shelf import AsJson, Token, answer, say_step, token_of
from lora_studio.errors import AdapterError
from lora_studio.workspace import Workspace, local


def _shelved(workspace: Workspace, adapter: str, token: str | None) -> str:
    """The id of an adapter of the library; one of the Hub enters it. Raises AdapterError and HubError."""
    try:
        return library.folder_of(workspace, adapter).name
    except AdapterError:
        if not shelf.IN_REPO.fullmatch(adapter):
            raise
    return shelf.pull(workspace, adapter, token=token)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""

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

    @app.command("demo-space", help="Write the folder of a Space that shows an adapter beside its base, and push it where --deploy says so.")
    def make_demo(
        adapter: str = typer.Argument(..., help="An adapter of the library, or owner/name of one on the Hub, which is pulled first."), target: str = typer.Argument(..., metavar="OUT", help="A folder that is not there yet."), *,
        hardware: str = typer.Option("cpu", help=f"What it runs on: {', '.join(demo_space.HARDWARE)}."),
        license: str = typer.Option(None, help="The adapter's licence, for example apache-2.0."),
        deploy: str = typer.Option("", metavar="OWNER/NAME", help="Push it to this Space, which is made where it is not there. Publish the adapter first, and its commit is shown."),
        public: bool = typer.Option(None, "--public/--private", help="With --deploy: who may see a new Space; by default as the adapter."),
        token_stdin: bool = Token, as_json: bool = AsJson,
    ):  # fmt: skip
        workspace, token = local(), token_of(token_stdin)
        adapter = _shelved(workspace, adapter, token)
        files = demo_space.write(workspace, adapter, Path(target), hardware=hardware, license=license, token=token)
        value = {"folder": str(Path(target).expanduser().absolute()), "files": len(files), "address": "", "notes": []}
        words = f"{len(files)} files are in {value['folder']}. Try it there: pip install -r requirements.txt && python app.py"
        if deploy:
            private = None if public is None else not public
            done = demo_space.deploy(workspace, adapter, deploy, hardware=hardware, license=license, private=private, token=token, report=say_step)
            value |= {"address": done.url, "notes": list(done.notes)}
            words = "\n".join([words, f"The {'private' if done.private else 'public'} Space is at {done.url}.", *done.notes])
        answer(value, as_json, words)
