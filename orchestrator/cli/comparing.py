"""The command that compares two models item by item."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.completion import complete_models
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import read_options
from orchestrator.cli.options import (
    AddressOption,
    ApplyChatTemplateOption,
    BatchSizeOption,
    ChatTemplateOption,
    ConfigOption,
    DeviceOption,
    IncludePathOption,
    LimitOption,
    NumFewshotOption,
    SetOption,
    SuiteOption,
    TrustRemoteCodeOption,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.session import open_session
from orchestrator.terminal.render import print_line


@app.command(rich_help_panel="Measure")
def compare(
    first: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A checkpoint, a run (by path or name), a Hugging Face folder, hub:OWNER/NAME, or "
            "a folder that lm-eval wrote with --log_samples.",
            autocompletion=complete_models,
        ),
    ],
    second: Annotated[
        str,
        typer.Argument(metavar="B", help="The other one.", autocompletion=complete_models),
    ],
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    suite: SuiteOption = None,
    include_path: IncludePathOption = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule", "-r", help="Iteration schedule of both; given twice, of A and of B."
        ),
    ] = None,
    num_fewshot: NumFewshotOption = None,
    apply_chat_template: ApplyChatTemplateOption = False,
    chat_template: ChatTemplateOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    address: AddressOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Compare two models on the same items: paired differences, intervals, McNemar's test.

    Example: iiet-orch compare my-run other-run --suite heldout
    """
    settings = read_options(
        config,
        set_,
        evaluation__suite=suite,
        evaluation__include_path=str(include_path) if include_path else None,
        evaluation__num_fewshot=num_fewshot,
        evaluation__apply_chat_template=chat_template or apply_chat_template or None,
        evaluation__limit=limit,
        evaluation__batch_size=batch_size,
        cluster__address=address,
        cluster__device=device,
    )
    with open_session(workspace, "compare", verbose=verbose, as_json=as_json) as session:
        from orchestrator.pipelines import comparing
        from orchestrator.reporting.comparison_tables import comparison_table

        result = comparing.compare(
            settings,
            models=(first, second),
            schedules=schedule or [],
            trust_remote_code=trust_remote_code,
            **session.common,
        )
        if as_json:
            session.print_json(result.to_json())
            return
        names = result.comparison.names
        print_line(session.console, f"A: {names[0]}\nB: {names[1]}")
        session.console.print(comparison_table(result.comparison))
        for sentence in (*result.findings, *result.comparison.notes):
            print_line(session.console, f"  {sentence}")
