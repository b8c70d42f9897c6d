"""The command line of keeping: the work of this home in a private repository on the Hub, and back from there."""

import typer

from lora_studio import keeping
from lora_studio.cli_shelf import AsJson, Token, answer, token_of
from lora_studio.workspace import local

GOES_ON = "The studio goes on with it every few minutes while it is running, with the Hub's own login."


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""

    @app.command("keep", help="Keep your work in a private repository of yours on the Hub, and bring back what was kept there.")
    def keep(
        repo: str = typer.Option("", metavar="NAME", help=f"The repository, made where it is not there; {keeping.NAME} when none is named."), *,
        stop: bool = typer.Option(False, "--stop", help="Send nothing from now on; the repository stays as it is."),
        token_stdin: bool = Token, as_json: bool = AsJson,
    ):  # fmt: skip
        workspace = local()
        if stop:
            answer(keeping.stop(workspace), as_json, "Nothing is sent from now on. What was kept stays on the Hub until you delete it there.")
            return
        token = token_of(token_stdin)
        keeping.begin(workspace, token, repo=repo)
        told = keeping.turn(workspace, token, everything=True)
        answer(told, as_json, "\n".join([*told["notes"], f"{keeping.words(told)} {GOES_ON}"]))
