"""What the shipped sweeps take on this machine."""

from __future__ import annotations

from orchestrator.evaluation.tasks import needs_lm_eval
from orchestrator.models.hub import is_hub_name
from orchestrator.pipelines.doctor import ShippedSweep
from orchestrator.planning.machine import installed_gpus
from orchestrator.settings.files import read_settings, shipped_sweeps
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.workspace.layout import Workspace


def price_shipped_sweeps(workspace: Workspace) -> list[ShippedSweep]:
    """Return what each shipped sweep takes on this machine; nothing is read from the hub.

    Args:
        workspace: Results would be written to its disk.
    """
    # An empty workspace on the same disk: results of this one must not count.
    unmade = Workspace(workspace.root / "not-made")
    num_installed_gpus = len(installed_gpus())
    sweeps = []
    for name, file in shipped_sweeps().items():
        # On this machine, whatever cluster RAY_ADDRESS names, and even if it names none.
        settings = read_settings(file, ("cluster.address=local",))
        plan = plan_sweep(settings, workspace=unmade)
        problem = next(iter(plan.problems.values()))
        num_gpus = settings.cluster.num_gpus
        if num_installed_gpus < num_gpus:
            problem = "this machine has too few GPUs"
        sweep = ShippedSweep(
            name=name,
            fits=problem is None,
            hours=plan.price.hours,
            num_devices=plan.price.num_devices,
            num_gpus=num_gpus,
            needs_hub=settings.data.source == "hub"
            or is_hub_name(settings.data.tokenizer)
            or needs_lm_eval(settings.evaluation),
            problem=problem,
        )
        sweeps.append(sweep)
    return sweeps
