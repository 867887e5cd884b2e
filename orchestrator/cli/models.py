"""Commands that generate text with a model, or import, export or pick one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli.command import Command
from orchestrator.cli.options import (
    MAX_COUNT,
    NOTHING_IS_TRAINED,
    ONLY_BOUNDED_LOSSES,
    STORED_INFLUENCE,
    CostOption,
    NameOption,
    QualityOption,
    SchedulesOption,
    complete_models,
    complete_sweeps,
    one_schedule,
)
from orchestrator.cli.session import Call, Warnings
from orchestrator.workspace.errors import UserError

if TYPE_CHECKING:
    from orchestrator.reporting.result import Result

MAX_SEED = 2**32 - 1
"""Largest seed that every library's random generator takes."""
FolderToWriteOption = Annotated[
    Path | None, typer.Option("--to", help="Folder to write (default: inside the workspace).")
]
ReplaceModelOption = Annotated[
    bool, typer.Option("--force", help="With --to: replace an export of another model.")
]


@Command("generate", group="Use models", options={"--device": "cluster.device"}, workspace="read")
def generate(
    call: Call,
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", autocompletion=complete_models)
    ] = None,
    schedule: SchedulesOption = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p")] = None,
    chat: bool = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, max=MAX_COUNT)
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, max=MAX_COUNT)] = None,
    top_p: float | None = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED)] = None,
    stop: list[str] | None = None,
    draft: str | None = None,
) -> Result | None:
    """Continue a text and print it while it is generated.

    The prompt is not changed; --chat puts it into the chat template of an imported model. With
    --draft, the model's cheaper schedule drafts tokens and the model verifies several at once.

    Example: iiet-orch generate my-run --prompt "The list is" -n 40

    Args:
        checkpoint: Checkpoint, run, trial or exported folder, by path or name, a sweep (its picked
            model), or hub:OWNER/NAME; by default the newest of finished runs and what `pick` chose
            last.
        schedule: Another iteration schedule: 1, or 2,1,1,0,0,0.
        prompt: Text to continue; several run as one batch.
        chat: Answer the prompt as a user's message, with the model's chat template.
        max_new_tokens: Maximum number of tokens to add (default: 64, or what fits the context).
        temperature: 0 always takes the likeliest token.
        top_k: Sample among the N likeliest tokens.
        top_p: Sample among the likeliest tokens that together hold this probability.
        seed: Random seed for sampling (default: random).
        stop: A text that ends the continuation; may be repeated.
        draft: Draft under a cheaper schedule, or the best one (auto); no token changes.

    Keys:
        model: folder of the model that was used
        schedule: its schedule, or `null` without corrections
        texts: one entry per prompt: `prompt`, and its continuation `text`
    """
    if temperature == 0 and (top_k or top_p is not None):
        raise UserError(
            "--top-k and --top-p limit what is sampled; add a --temperature above 0, such as 0.8"
        )
    prompts = prompt or []
    if prompt is None:
        prompts = ["" if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")]
        if prompts == [""]:
            raise UserError("there is nothing to continue; give --prompt TEXT, or pipe a text in")
    from orchestrator.evaluation.answers import Sampling
    from orchestrator.pipelines.generating import open_generator

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    terminal = call.session.terminal
    writer = open_generator(
        call.session.workspace,
        checkpoint,
        one_schedule(schedule),
        draft,
        device=call.settings.cluster.device,
        # The text goes to standard output, so warnings go elsewhere.
        progress=Warnings(terminal),
    )
    token_prompts = writer.texts_to_continue(prompts, chat=chat)
    own_schedule = writer.schedule
    if not isinstance(call.session.progress, Warnings):
        under = ",".join(map(str, own_schedule)) or "-"
        typer.echo(f"model: {writer.checkpoint}, schedule {under}", file=terminal)
    if not call.as_json and len(prompts) == 1:
        pieces = writer.stream(token_prompts[0], sampling)
        if not chat:  # An answer is printed without its question.
            typer.echo(prompts[0], nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
        return None
    texts = writer.continue_all(token_prompts, sampling)
    values: dict[str, Any] = {
        "model": str(writer.checkpoint),
        "schedule": list(own_schedule) or None,
        "texts": [{"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)],
    }
    between = ": " if chat else ""
    return call.answer(values, [f"{p}{between}{t}\n" for p, t in zip(prompts, texts, strict=True)])


@Command("import", group="Use models")
def import_folder(
    call: Call,
    folder: Annotated[Path, typer.Argument()],
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH")] = None,
    name: NameOption = None,
) -> Result:
    """Import a published, Llama, GGUF or exported model, or a checkpoint of another workspace.

    Example: iiet-orch import hub:HuggingFaceTB/SmolLM2-135M --name smollm2

    Args:
        folder: Model folder, GGUF file, a checkpoint or run of another workspace, or
            hub:OWNER/NAME.
        tokenizer: A tokenizer.json, or hub:NAME, if the model has none.

    Keys:
        checkpoint: the new checkpoint
    """
    from orchestrator.pipelines.models import import_model

    checkpoint = import_model(folder, tokenizer=tokenizer, name=name, **call.common)
    return call.answer({"checkpoint": str(checkpoint)}, [f"checkpoint: {checkpoint}"])


@Command(
    "export",
    group="Use models",
    options={"--device": "cluster.device"},
    config="option",
    unread={
        "data": "held-out tasks come from the data that the model was trained on",
        **NOTHING_IS_TRAINED,
        **ONLY_BOUNDED_LOSSES,
        **STORED_INFLUENCE,
    },
)
def export(
    call: Call,
    checkpoint: Annotated[Path | None, typer.Argument(autocompletion=complete_models)] = None,
    to: FolderToWriteOption = None,
    force: ReplaceModelOption = False,
    schedule: SchedulesOption = None,
    measure: bool = True,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", show_default=False)] = None,
    token: str | None = None,
) -> Result:
    """Export a folder that transformers and lm-eval load without this package.

    Example: iiet-orch export my-run --to my-model --push-to-hub me/my-model --private

    Args:
        checkpoint: Checkpoint, run or trial, by path or name, or hub:OWNER/NAME; by default the
            newest of finished runs and what `pick` chose last.
        schedule: Another iteration schedule: 1, or 2,1,1,0,0,0. Servers run a folder under its
            schedule; export once for each.
        measure: Evaluate the model for its card, unless that is done.
        dtype: Type of the weights (default: an import's own, else fp32).
        push_to_hub: Upload the folder to the Hugging Face hub, too.
        private: Who sees a new repository (default: as its owner's settings say).
        token: Token of the hub (default: HF_TOKEN, or that of `hf auth login`).

    Keys:
        folder: the exported folder
        hub: with `--push-to-hub` the address of its page, else `null`
    """
    if push_to_hub is None and (private is not None or token):
        raise UserError(
            "--private, --public and --token are for --push-to-hub; name the repository"
        )
    if not measure:
        nothing = "--no-measure evaluates nothing"
        call.refuse_unread({"evaluation": nothing, "cluster": nothing})
    from orchestrator.models.hub import check_upload, upload_model
    from orchestrator.pipelines import models

    if push_to_hub is not None:
        check_upload(push_to_hub, token)  # Before anything is measured.
    folder = models.export(
        checkpoint,
        settings=call.settings,
        to=to,
        force=force,
        schedule=one_schedule(schedule),
        measure=measure,
        dtype=dtype,
        **call.common,
    )
    lines = [f"exported: {folder}"]
    address = None
    if push_to_hub is not None:
        call.session.progress.start("push")
        address = upload_model(folder, push_to_hub, private=private, token=token)
        call.session.progress.finish(address)
        lines.append(f"pushed: {address}")
    return call.answer({"folder": str(folder), "hub": address}, lines)


@Command("pick", group="Use models", plans=True)
def pick(
    call: Call,
    sweep: Annotated[str | None, typer.Argument(autocompletion=complete_sweeps)] = None,
    keep: float | None = None,
    confidence: float = 0.0,
    budget: float | None = None,
    knee: bool = False,
    best: bool = False,
    cheapest: bool = False,
    cost: CostOption = None,
    quality: QualityOption = None,
    allow_loss: Annotated[bool, typer.Option("--allow-loss")] = False,
    to: FolderToWriteOption = None,
    force: ReplaceModelOption = False,
) -> Result:
    """Choose a model from a sweep's front; export it and register it in MLflow.

    Example: iiet-orch pick --keep 0.99 --to my-model

    Args:
        sweep: Name of a sweep (default: the newest).
        keep: Cheapest that keeps this share of the quality, such as 0.99.
        confidence: With --keep: how sure that must be, such as 0.9.
        budget: Best that costs at most this much, in the unit of --cost.
        knee: Farthest above the line between the ends.
        best: Highest quality.
        cheapest: Lowest cost.
        allow_loss: Also a model that has lost more against the teacher's source than the sweep's
            evaluation.retention allows.
    """
    if call.dry_run and to is not None:
        raise UserError("--dry-run exports nothing, and --to says where to; leave one out")
    from orchestrator.pipelines.models import plan_pick, run_pick

    plan = plan_pick(
        sweep,
        keep=keep,
        confidence=confidence,
        budget=budget,
        knee=knee,
        best=best,
        cheapest=cheapest,
        cost=cost,
        quality=quality,
        allow_loss=allow_loss,
        to=to,
        force=force,
        **call.common,
    )
    return call.finish(plan, run_pick)
