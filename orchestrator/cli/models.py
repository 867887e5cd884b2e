"""Commands that generate text with a model, or import, export or pick one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.cli.app import app
from orchestrator.cli.completion import complete_models
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import one_schedule, read_options
from orchestrator.cli.options import (
    MAX_COUNT,
    MAX_SEED,
    ConfigOption,
    DeviceOption,
    FolderToWriteOption,
    ModelArgument,
    ReplaceModelOption,
    ScheduleOption,
    SetOption,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.session import Warnings, open_session
from orchestrator.terminal.render import print_line
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import check_name_option


@app.command(rich_help_panel="Models")
def generate(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Checkpoint, run or exported folder, by path or name, a sweep (its picked model), "
            "or hub:OWNER/NAME; by default what `pick` chose last, or the newest IIET or imported "
            "model if that is newer.",
            autocompletion=complete_models,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Text to continue; several run as one batch."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Answer the prompt as a user's message, with the model's chat template."
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="With --chat: the system's message, before the user's."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            max=MAX_COUNT,
            help="Maximum number of tokens to add (default: 64, or what fits the context).",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0.0, help="0 always takes the likeliest token."),
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Sample among the N likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest tokens that together hold this probability."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Random seed for sampling (default: random)."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends the continuation; may be repeated."),
    ] = None,
    kv: Annotated[
        Literal["exact", "last"],
        typer.Option(help="Cache slots: `exact`, one per evaluation, or `last`, one per layer."),
    ] = "exact",
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft under a cheaper schedule, or the best one (auto); no token changes."
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_COUNT, help="Tokens to draft at once (default: as many as pay)."
        ),
    ] = None,
    schedule: ScheduleOption = None,
    device: DeviceOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = None,
) -> None:
    """Continue a text and print it while it is generated.

    The prompt is not changed; --chat puts it into the chat template of an imported model. With
    --draft, the model's cheaper schedule drafts tokens and the model verifies several at once.

    Example: iiet-orch generate my-run --prompt "The list is" -n 40
    """
    if draft is None and draft_tokens is not None:
        raise UserError(f"--draft-tokens {draft_tokens} needs --draft SCHEDULE or --draft auto")
    prompts = prompt if prompt is not None else [_piped_prompt()]
    with open_session(
        workspace, "generate", verbose=verbose, as_json=as_json, must_write=False
    ) as session:
        from orchestrator.pipelines import generating

        sampling = generating.Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            kv_strategy=kv,
        )
        drafting = None
        if draft is not None:
            drafting = generating.Drafting(draft=draft, num_tokens=draft_tokens or "auto")
        writer = generating.open_generator(
            session.workspace,
            checkpoint,
            one_schedule(schedule),
            drafting,
            device=device,
            # The text goes to standard output, so warnings go elsewhere.
            progress=Warnings(session.terminal),
        )
        asked = writer.as_asked(prompts, chat=chat, system=system)
        own = writer.decoder.config.schedule
        if verbose is not False:
            under = f"schedule {own}" if own else "no corrections"
            typer.echo(f"model: {writer.checkpoint}, {under}", file=session.terminal)
        if as_json or len(prompts) > 1:
            texts = writer.continue_all(asked, sampling)
            if as_json:
                value: dict[str, Any] = {"model": str(writer.checkpoint)}
                value["schedule"] = None if own is None else list(own)
                pairs = zip(prompts, texts, strict=True)
                value["texts"] = [{"prompt": p, "text": text} for p, text in pairs]
                session.print_json(value)
                return
            for text, written in zip(prompts, texts, strict=True):
                typer.echo(f"{text}{': ' if chat else ''}{written}\n")
            return
        pieces = writer.stream(asked[0], sampling)
        if not chat:  # An answer is printed without its question.
            typer.echo(prompts[0], nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


def _piped_prompt() -> str:
    import sys

    text = "" if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    if not text:
        raise UserError("there is nothing to continue; give --prompt TEXT, or pipe a text in")
    return text


@app.command("import", rich_help_panel="Models")
def import_folder(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Model folder, GGUF file, a checkpoint or run of another workspace, or "
            "hub:OWNER/NAME."
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A tokenizer.json, or hub:NAME, if the model has none."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run (default: that of the folder or file).",
            callback=check_name_option,
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = None,
) -> None:
    """Import a published, Llama, GGUF or exported model, or a checkpoint of another workspace.

    Example: iiet-orch import Llama-3.2-1B --name llama
    """
    with open_session(workspace, "import", verbose=verbose, as_json=as_json) as session:
        from orchestrator.pipelines.importing import import_model

        checkpoint = import_model(folder, tokenizer=tokenizer, name=name, **session.common)
        if as_json:
            session.print_json({"checkpoint": str(checkpoint)})
        else:
            print_line(session.console, f"checkpoint: {checkpoint}")


@app.command(rich_help_panel="Models")
def export(
    checkpoint: ModelArgument = None,
    to: FolderToWriteOption = None,
    force: ReplaceModelOption = False,
    schedule: ScheduleOption = None,
    measure: Annotated[
        bool, typer.Option(help="Evaluate the model for its card, unless that is done.")
    ] = True,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hugging Face hub, too."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            show_default=False,
            help="Who sees a new repository (default: as its owner's settings say).",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Token of the hub (default: HF_TOKEN, or that of `hf auth login`)."),
    ] = None,
    device: DeviceOption = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Export a folder that transformers and lm-eval load without this package.

    Example: iiet-orch export my-run --to my-model --push-to-hub me/my-model --private
    """
    if push_to_hub is None and (private is not None or token):
        raise UserError(
            "--private, --public and --token are for --push-to-hub; name the repository"
        )
    settings: Any = read_options(config, set_, cluster__device=device)
    with open_session(workspace, "export", verbose=verbose, as_json=as_json) as session:
        from orchestrator.pipelines import exporting, pushing

        options: dict[str, Any] = {
            "model": checkpoint,
            "to": to,
            "force": force,
            "schedule": one_schedule(schedule),
            "measure": measure,
            **session.common,
        }
        address = None
        if push_to_hub is None:
            folder = exporting.export(settings, **options)
        else:
            target = pushing.HubTarget(repository=push_to_hub, private=private, token=token)
            folder, address = pushing.export_to_hub(settings, target, **options)
        if as_json:
            session.print_json({"folder": str(folder), "hub": address})
            return
        print_line(session.console, f"exported: {folder}")
        if address:
            print_line(session.console, f"pushed: {address}")
