"""A run told to others: a card in Hugging Face's form, and the model on its hub."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import timm
import yaml
from timm.models import push_to_hf_hub
from torch import nn
from yacs.config import CfgNode

from vmamba.analysis.prediction import file_of, load_model
from vmamba.analysis.tables import read_json
from vmamba.analysis.zoo import data_of
from vmamba.config import get_config, image_size
from vmamba.errors import UserError
from vmamba.files import read_text, write_text
from vmamba.models.pretrained import best_kind, read_weights
from vmamba.models.variants import TIMM
from vmamba.runtime import evaluation
from vmamba.runtime.checkpoint import read_training_state
from vmamba.runtime.records import NOT_COUNTED, is_number, read_metrics, results_of
from vmamba.runtime.task import open_task
from vmamba.text import counted, printable

MADE_HERE = "<!-- made from a run by vmamba -->"
_PIPELINES = {"classification": "image-classification", "detection": "object-detection"}
_PIPELINES |= {"segmentation": "image-segmentation"}
_OF_A_START = {"command": str, "seed": int, "devices": list, "versions": dict}  # in run.json, and of which kind
_OF_A_START |= {"commit": (str, NoneType), "changed": (bool, NoneType)}
_OF_A_MACHINE = ("OUTPUT", "TAG", "NAME", "PRINT_FREQ", "DATA.DATA_PATH", "DATA.NUM_WORKERS", "DEVICE", "WANDB")


def write_card(checkpoint: str | Path, path: str | Path, licence: str = "other", weights: str = "auto") -> Path:
    """Write the card of a run as README.md beside the file at `path`: see `card_text`.  Returns its path."""
    card = Path(path).parent / "README.md"
    write_text(card, card_text(checkpoint, path, licence, weights))
    return card


def card_text(checkpoint: str | Path, path: str | Path, licence: str = "other", weights: str = "auto") -> str:
    """The card of a run for the file at `path`, with README.md's head.

    Args:
        checkpoint: of a run, in its folder, or the folder.
        licence: of the weights, one of the hub's names, such as mit or cc-by-nc-sa-4.0.
        weights: which of the checkpoint's, as of `vmamba.load_checkpoint`.

    Raises UserError where no run's folder is around the checkpoint, where its run.json is of another form, and where
    another README.md would be written over.
    """
    card = Path(path).parent / "README.md"
    if card.exists() and MADE_HERE not in read_text(card):
        raise UserError(f"'{printable(card)}' would be written over; move it away, or export into another folder")
    folder = run_of(checkpoint)
    config = get_config(folder / "config.yaml")
    head = yaml.safe_dump(
        {
            "license": licence,
            "library_name": "timm" if config.TASK == "classification" else "vmamba",
            "pipeline_tag": _PIPELINES[config.TASK],
            "tags": [_PIPELINES[config.TASK], "vmamba"],
        },
        sort_keys=False,
    )
    use = f'```python\nimport vmamba\n\nmodel = vmamba.load_model("{Path(path).name}")\n```\n'
    return f"---\n{head}---\n\n{MADE_HERE}\n\n# {config.NAME}\n\n{describe(checkpoint, weights)}\n## Use\n\n{use}"


def run_of(checkpoint: str | Path) -> Path:
    """The folder of the run that wrote a checkpoint.  Raises UserError where it does not lie in one."""
    file = Path(file_of(checkpoint))
    if not (file.parent / "config.yaml").is_file() or not (file.parent / "run.json").is_file():
        raise UserError(
            f"'{printable(file)}' does not lie in the folder of a run, which would tell of it; name a run's checkpoint"
        )
    return file.parent


def describe(checkpoint: str | Path, weights: str = "auto") -> str:
    """What the folder of a run's checkpoint tells, in Markdown: model, data, recipe, results, commands."""
    folder, file = run_of(checkpoint), Path(file_of(checkpoint))
    config, starts = get_config(folder / "config.yaml"), read_starts(folder / "run.json")
    source, results = _results(folder, file, config)
    options = ", ".join(f"{name} {value}" for name, value in config.MODEL.OPTIONS.items())
    facts = starts[-1]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    commit = f"{facts['commit']}{' with changes' if facts['changed'] else ''}" if facts["commit"] else "unknown"
    lines = [
        f"`{config.MODEL.NAME}`{f' with {options}' if options else ''}, trained on {data_of(config)} at "
        f"{image_size(config)[0]} x {image_size(config)[1]} pixels, {counted(config.MODEL.IN_CHANS, 'channel')}.\n"
        if config.TASK == "classification"
        else f"`{config.MODEL.NAME}`, {config.TASK} of {counted(config.MODEL.NUM_CLASSES, 'class', 'classes')}.\n",
        "## Results\n",
        f"{source}. {_held(file, weights, results)}\n",
        *(f"- {name}: {value:.4g}" for name, value in results.items()),
        "\n## Recipe\n",
        "What is not said has the default of docs/config.md.\n",
        *(f"- {key}: {value}" for key, value in _changed(config).items()),
        "\n## How it was made\n",
        *dict.fromkeys(f"    {start['command']}" for start in starts),
        "",
        f"Seed {facts['seed']}, on {', '.join(dict.fromkeys(facts['devices']))}; {versions}; commit {commit}.\n",
    ]
    return "\n".join(lines)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in a run.json.  Raises UserError where it is of another form than a run's."""
    told = read_json(path)
    starts = told.get("starts") if isinstance(told, dict) else None
    if not isinstance(starts, list) or not starts:
        raise UserError(f"'{printable(path)}' tells no start of a run; put back the one that the run wrote")
    for number, start in enumerate(starts, 1):
        for name, kind in _OF_A_START.items():
            if not isinstance(start, dict) or name not in start or not isinstance(start[name], kind):
                raise UserError(
                    f"'{printable(path)}', start {number}, does not tell '{name}' as a run does; put back the one that "
                    "the run wrote"
                )
    return starts


def _results(folder: Path, file: Path, config: CfgNode) -> tuple[str, dict[str, float]]:
    """What numbers are of, and those: an evaluation of this very file by itself on the run's data, else the round that
    ended in it, else the last round."""
    path = folder / "evaluation.json"
    told = read_json(path) if path.is_file() else None
    if told and _is_of(told, path, file, config):
        if not all(map(is_number, told["results"].values())):
            return f"Of {file.name}, evaluated by itself, which {NOT_COUNTED}", {}
        return f"Of {file.name}, evaluated by itself", _numbers({**told["results"], **told["details"]})
    headline = open_task(config).headline
    rounds = [each for each in read_metrics(folder / "metrics.jsonl") if {headline, f"ema_{headline}"} & each.keys()]
    if not rounds:
        return "The run has evaluated nothing", {}
    state = read_training_state(file) or {}
    its = next((each for each in rounds if each.get("step", -1) == state.get("step")), None)
    entry = its or rounds[-1]
    source = f"Of the round of training that {file.name} is of" if its else "Of the run's last round of training"
    if not results_of(entry):
        return f"{source}, whose evaluation {NOT_COUNTED}", {}
    return source, _numbers({name: entry.get(name) for name in ("epoch", "train_loss")} | results_of(entry))


def _is_of(told: Any, path: Path, file: Path, config: CfgNode) -> bool:
    """Whether an evaluation.json at `path` is of this file as it is now, and of the run's data."""
    parts = ("data", "results", "details")
    if not isinstance(told, dict) or not all(isinstance(told.get(part), dict) for part in parts):
        return False
    same = Path(str(told.get("checkpoint"))).resolve() == file.resolve() and told["data"] == evaluation.data_of(config)
    return same and path.stat().st_mtime >= file.stat().st_mtime


def _held(file: Path, weights: str, results: Mapping[str, float]) -> str:
    """Which weights are published, and which numbers are theirs."""
    found = read_weights(file)
    averaged = (best_kind(found) if weights == "auto" else weights) == "ema"
    told = "The weights are their average (EMA)" if averaged else "The weights are the plain ones, not an average"
    if any(name.startswith("ema_") for name in results):
        told += f", whose numbers begin with{'' if averaged else 'out'} ema_"
    return f"{told}."


def _numbers(told: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in told.items() if isinstance(value, (int, float))}


def _changed(config: CfgNode) -> dict[str, Any]:
    """The keys that have another value than their default, but those of the machine."""
    plain, flat = get_config(None, ["TASK", config.TASK]), {}

    def walk(node: CfgNode, default: Mapping[str, Any], path: str) -> None:
        for name, value in node.items():
            if isinstance(value, CfgNode):
                walk(value, default.get(name, {}), f"{path}{name}.")
            elif value != default.get(name) and f"{path}{name}" not in _OF_A_MACHINE:
                flat[f"{path}{name}"] = value

    walk(config, plain, "")
    return flat


def push(
    checkpoint: str | Path, repo: str, *, licence: str = "other", private: bool = False, weights: str = "auto"
) -> str:
    """Put a classifier of a run on Hugging Face's hub, through timm: `timm.create_model("hf-hub:USER/NAME",
    pretrained=True)` gives it back, of our models after `import vmamba`.

    Args:
        checkpoint: of a run, in its folder, or the folder.
        repo: USER/NAME, made where it is not there; who may is what `huggingface-cli login` has said.
        licence: as of `write_card`, which is the page of a new one.
        weights: as of `vmamba.load_checkpoint`.

    Returns the address.  Raises UserError for other models, and where the hub refuses.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"'{printable(repo)}' is no repository of the hub; give it as USER/NAME")
    description = describe(checkpoint, weights)
    model = load_model(checkpoint, weights=weights)
    if model.config.TASK != "classification":
        raise UserError(f"the hub's models of timm are classifiers, and this is one of {model.config.TASK}")
    published, settings, arguments = as_timms(model)
    card = {"license": licence, "tags": ["image-classification", "timm", "vmamba"], "description": description}
    try:
        push_to_hf_hub(
            published,
            repo,
            private=private,
            model_config=settings,
            model_card=card,
            model_args=arguments,
            safe_serialization=True,
        )
    except Exception as error:  # of the network, the hub, its library
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UserError(f"the hub did not take '{printable(repo)}': {reason}") from error
    return f"https://huggingface.co/{repo}"


def as_timms(model: nn.Module) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A loaded classifier as timm builds it; what the hub's config tells of it, and the arguments that it is built
    with."""
    config = model.config
    data, size = config.DATA, [config.MODEL.IN_CHANS, *image_size(config)]
    arguments = {"in_chans": config.MODEL.IN_CHANS} | {
        name: list(value) if isinstance(value, (list, tuple)) else value for name, value in config.MODEL.OPTIONS.items()
    }
    name = config.MODEL.NAME
    if name.startswith(TIMM):
        published = model
    else:
        published = timm.create_model(name, num_classes=config.MODEL.NUM_CLASSES, **arguments)
        published.load_state_dict(model.state_dict())
    told = {
        "input_size": size,
        "mean": list(data.MEAN) * (size[0] // len(data.MEAN)),
        "std": list(data.STD) * (size[0] // len(data.STD)),
        "interpolation": data.INTERPOLATION,
        "crop_pct": config.TEST.CROP_PCT if config.TEST.CROP else 1.0,
        "crop_mode": "center" if config.TEST.CROP else "squash",
    }
    return published.eval(), {"pretrained_cfg": told, "label_names": list(model.class_names)}, arguments
