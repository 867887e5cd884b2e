"""Open a model folder of any kind; every command uses `open_model` or `load_model`.

A decoder runs checkpoints, exports, folders of the published naming (IIET, PCformer), and plain
models of transformers (`iiet.plain_models`), which become vanilla models. No code of a folder runs,
and missing weights are errors. transformers runs any other architecture, which can be evaluated; of
a looped model whose kind is known (`models.loops`) a depth takes the place of the iteration
schedule.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.published import decoder_from_published
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG, MODEL_TYPE
from orchestrator.models.folder import (
    TRAINING_STATE,
    NoDecoder,
    check_checkpoint,
    decoder_config,
    is_checkpoint,
    load_config,
    model_files_key,
    read_config,
    resolve_checkpoint,
    text_files_key,
    tokenizer_file,
    weight_files,
    weights_key,
)
from orchestrator.models.hub import model_folder_name
from orchestrator.models.lookup import find_model_folder, find_trial, resolve_model
from orchestrator.models.loops import LOOPED_MODELS, Depth, LoopedModel
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.records.training import schedule_parameters
from orchestrator.settings.training import Precision, default_precision
from orchestrator.terminal.render import shortest_schedule
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import resolve_path
from orchestrator.workspace.layout import PROVENANCE, Workspace
from orchestrator.workspace.provenance import file_key

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision in the settings -> dtype."""
STORED_DTYPES: dict[str, torch.dtype] = {**DTYPES, "fp16": torch.float16}
"""Type of weights in a file -> dtype."""
FIRST_WITH_BF16 = (8, 0)
"""Compute capability from which GPUs have bfloat16."""
AUTO = "auto"
"""Name of the device that is a GPU if there is one, else the CPU."""
ASSUMED_CONTEXT_LENGTH = 2048
"""Length for a model of transformers whose configuration names none."""


def best_device(device: str | torch.device = AUTO) -> str | torch.device:
    """Return a GPU for `AUTO` if there is one, else the CPU; any other device unchanged."""
    if device != AUTO:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_precision(device: str | torch.device) -> Precision:
    """Return the precision that a model on this device is evaluated in if none is set."""
    return default_precision(on_gpus=torch.device(device).type == "cuda" and has_bf16(device))


def has_bf16(device: str | torch.device) -> bool:
    """Return whether a GPU has bfloat16; PyTorch emulates it slowly on older ones."""
    return torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16


def use_tf32(device: str | torch.device) -> None:
    """Let float32 matrix products on GPUs run as TF32, in this process; CPUs compute as before."""
    # On CPUs the same switch allows bfloat16 products.
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    schedule: IterationSchedule | None = None,
    check: bool = True,
    frozen: bool = False,
) -> Decoder:
    """Load the decoder in a model folder, in evaluation mode.

    Args:
        folder: Holds `config.json` and the weights.
        device: Device of the weights; `AUTO` for a GPU if there is one.
        dtype: Dtype of the weights, whatever the files hold.
        schedule: Iteration schedule, instead of the model's own.
        check: Verify the checksums of a checkpoint first.
        frozen: Without gradients. A model of ours stays memory-mapped on the CPU, so that all
            processes of a machine share its weights; otherwise they are a copy that can be trained.

    Raises:
        UserError: If the folder is not a model folder, is damaged, needs what a decoder does not
            support, has missing, unknown or not finite weights, or the schedule does not fit it.
    """
    if check and any((folder / name).exists() for name in (PROVENANCE, TRAINING_STATE)):
        check_checkpoint(folder, remember=True)
    is_ours = read_config(folder).get("model_type") == MODEL_TYPE
    try:
        if is_ours:
            load_config(folder)  # Names the package of a method that is not installed.
            decoder = Decoder.from_pretrained(folder)
        else:
            decoder = decoder_from_published(read_config(folder), _weights(folder, dtype))
        if schedule is not None:
            decoder = decoder.with_schedule(schedule)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"this version of the program cannot use {folder}: {error}") from None
    device = best_device(device)
    use_tf32(device)
    decoder = decoder.to(device, dtype)
    if is_ours and not frozen and decoder.device.type == "cpu":
        decoder = copy.deepcopy(decoder)  # Its weights are mapped from the file.
    return decoder.requires_grad_(not frozen).eval()


def _weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read all weights in a dtype; takes the memory of the model and of one tensor."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                # Opened for each tensor: the pages that were read stay in memory until a file is
                # closed, which of a file in half precision is half of the model.
                with safe_open(file, framework="pt") as tensors:
                    weights[name] = tensors.get_tensor(name).to(dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
    return weights


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model on disk, under one iteration schedule."""

    path: Path
    name: str
    """Name of its run or folder, and the schedule or depth if it is not the model's own."""
    key: tuple[Any, ...]
    """All that scores depend on, as JSON values: weights, configuration, tokenizer."""
    config: ModelConfig | None
    """Sizes, method and schedule; None if transformers runs the model."""
    why_no_decoder: str = ""
    """Why transformers runs the model, as a sentence; empty if a decoder does."""
    architecture: str
    """The method's registry key, or transformers' name of the architecture."""
    context_length: int
    """Largest number of tokens that the model reads at once."""
    is_external: bool
    """Whether `path` is a model folder from elsewhere, not a checkpoint of this project."""
    text_folder: Path
    """Folder of the tokenizer."""
    loops: LoopedModel | None = None
    """What a depth is and costs, of a looped model that transformers runs; None of any other."""
    depth: Depth | None = None
    """How often the loops run; None without `loops`."""

    def looped(self) -> tuple[LoopedModel, Depth]:
        """Return `loops` and `depth` of a model that has them."""
        assert self.loops is not None, "only a looped model is asked for its loops"
        assert self.depth is not None, "a looped model has a depth"
        return self.loops, self.depth

    def parameters(self) -> dict[str, str]:
        """Return the parameters of a tracked run: method, and iteration schedule or depth."""
        if self.config is not None:
            return schedule_parameters(self.config)
        depth = {"depth": ",".join(map(str, self.depth))} if self.depth else {}
        return {"method": self.architecture, **depth}

    def tokenizer(self, *, trust_remote_code: bool = False) -> ModelTokenizer:
        """Load the model's tokenizer.

        Raises:
            UserError: If the model has none, or one that cannot be used.
        """
        return ModelTokenizer(self.text_folder, trust_remote_code=trust_remote_code)

    def decoder(self, dtype: torch.dtype = torch.float32, *, device: str = "cpu") -> Decoder:
        """Load the model with weights of this dtype.

        Raises:
            UserError: If only transformers can run it, or its weights are missing or damaged.
        """
        if self.config is None:
            raise UserError(self.why_no_decoder)
        return load_model(self.path, device=device, dtype=dtype, schedule=self.config.corrections)


def open_model(
    path: Path,
    schedule: str | IterationSchedule | None = None,
    *,
    text_folder: Path | None = None,
) -> OpenedModel:
    """Return the model at a path.

    Args:
        path: A checkpoint, a run (its newest checkpoint), or a model folder from elsewhere.
        schedule: Iteration schedule to use instead of the model's own.
        text_folder: Checkpoint whose tokenizer reads text for a checkpoint; its own when unset.

    Raises:
        UserError: If there is no model, it is damaged, or the schedule does not fit it.
    """
    path = resolve_path(path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; a model is a checkpoint, a run or its folder")
    is_external = not is_checkpoint(path) and (path / CONFIG).is_file()
    if not is_external:
        path = resolve_checkpoint(path)

    # Who runs it: a decoder, which has a configuration, or transformers.
    config = None
    why_no_decoder = ""
    try:
        config = decoder_config(path) if is_external else load_config(path)
    except NoDecoder as error:
        why_no_decoder = str(error)
    values = read_config(path)
    architecture = str(values.get("model_type") or "unknown")

    # The schedule of a decoder, or the depth of a looped model that transformers runs.
    loops = None
    depth = None
    if config is None and architecture in LOOPED_MODELS:
        loops = LOOPED_MODELS[architecture](values)
        depth = loops.default_depth if schedule is None else loops.parse(str(schedule))
    elif config is None and schedule is not None:
        raise UserError(f"{path} is a {architecture} model, which has no iteration schedule")
    if config is not None and schedule is not None:
        try:
            if isinstance(schedule, str):
                schedule = IterationSchedule.parse(schedule, num_layers=config.num_layers)
            config = dataclasses.replace(config, schedule=schedule)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    # The name for people.
    name = model_folder_name(path).rpartition("/")[2] if is_external else path.parent.name
    if config is not None and schedule is not None:
        name += f" r={shortest_schedule(tuple(config.corrections))}"
    elif depth is not None and schedule is not None:
        name += f" depth={','.join(map(str, depth))}"

    # The key of stored scores.
    text_folder = text_folder or path
    computation: Any
    if config is not None:
        computation = config.to_dict()
    elif loops and depth != loops.default_depth:
        computation = ["transformers", depth]
    else:
        computation = "transformers"  # Its own depth is in its files.
    key = [model_files_key(path) if is_external else weights_key(path), computation]
    if not is_external:  # Otherwise the tokenizer is one of the model's files.
        texts = [file_key(tokenizer_file(text_folder)), text_files_key(text_folder)]
        key += filter(None, texts)

    # Models that read text and pictures have the sizes of the text's part in a section.
    text_values = values.get("text_config") or values
    context_length = (
        text_values.get("max_position_embeddings")
        or text_values.get("n_positions")
        or ASSUMED_CONTEXT_LENGTH
    )
    return OpenedModel(
        path=path,
        name=name,
        key=tuple(key),
        config=config,
        why_no_decoder=why_no_decoder,
        architecture=config.method if config else architecture,
        context_length=config.context_length if config else int(context_length),
        is_external=is_external,
        text_folder=text_folder,
        loops=loops,
        depth=depth,
    )


def open_models(
    workspace: Workspace,
    paths: Sequence[Path] | None,
    schedules: Sequence[str] | None,
    *,
    note: Callable[[str], None] | None = None,
) -> list[OpenedModel]:
    """Return the models that a user named, each under each of the schedules.

    Args:
        paths: Checkpoints, runs or trials, their names, or model folders; if empty, as
            `resolve_model`.
        schedules: Iteration schedules; if empty, each model's own.
        note: Called with a sentence that says which model is used if none is named.

    Raises:
        UserError: If one is missing or damaged, or a schedule does not fit it.
    """
    folders: list[tuple[Path, IterationSchedule | None]] = []
    for path in paths or ():
        trial = find_trial(workspace, path)
        folders.append(trial or (find_model_folder(workspace, path, model_types=None), None))
    if not paths:
        folders.append(resolve_model(workspace, note=note))
    models: list[OpenedModel] = []
    for folder, trial_schedule in folders:
        applied: Sequence[str | IterationSchedule | None] = schedules or [trial_schedule]
        models += [open_model(folder, schedule) for schedule in applied]
    return models


def model_labels(models: Sequence[OpenedModel]) -> list[str]:
    """Return a unique label for each model.

    For one model under several schedules, the labels are the schedules. Otherwise they are names;
    equal names get the checkpoint, and then a number.
    """
    schedules = [tuple(model.config.corrections) for model in models if model.config]
    is_one_model = len({model.path for model in models}) == 1
    if len(models) > 1 and is_one_model and len(set(schedules)) == len(models):
        return [f"r={shortest_schedule(schedule)}" for schedule in schedules]

    labels: list[str] = []
    for model in models:
        label = model.name
        if any(label == other.name and model.path != other.path for other in models):
            folder_name = model_folder_name(model.path)
            if "/" not in folder_name:  # It is none of the hub's, which has its owner's name.
                folder_name = "/".join(model.path.parts[-2:])
            _, separator, schedule_text = label.partition(" r=")
            label = folder_name + separator + schedule_text
        labels.append(label)

    unique_labels: list[str] = []
    for number, label in enumerate(labels):
        num_before = labels[:number].count(label)
        unique_labels.append(f"{label} ({num_before + 1})" if num_before else label)
    return unique_labels
