"""A run told to others: a card in Hugging Face's form, and the model on its hub."""

from collections.abc import Mapping
from pathlib import Path
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
from vmamba.models.variants import TIMM
from vmamba.runtime.records import read_metrics
from vmamba.text import counted, printable

MADE_HERE = "<!-- made from a run by vmamba -->"
_PIPELINES = {"classification": "image-classification", "detection": "object-detection"}
_PIPELINES |= {"segmentation": "image-segmentation"}
_OF_A_MACHINE = ("OUTPUT", "TAG", "NAME", "PRINT_FREQ", "DATA.DATA_PATH", "DATA.NUM_WORKERS", "DEVICE", "WANDB")


def write_card(checkpoint: str | Path, path: str | Path, licence: str = "other") -> Path:
    """Write the card of a run as README.md beside the file at `path`.

    Args:
        checkpoint: of a run, in its folder, or the folder.
        licence: of the weights, one of the hub's names, such as mit or cc-by-nc-sa-4.0.

    Returns its path.  Raises UserError where no run's folder is around the checkpoint, and where another README.md
    would be written over.
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
    write_text(card, f"---\n{head}---\n\n{MADE_HERE}\n\n# {config.NAME}\n\n{describe(folder)}\n## Use\n\n{use}")
    return card


def run_of(checkpoint: str | Path) -> Path:
    """The folder of the run that wrote a checkpoint.  Raises UserError where it does not lie in one."""
    file = Path(file_of(checkpoint))
    if not (file.parent / "config.yaml").is_file() or not (file.parent / "run.json").is_file():
        raise UserError(
            f"'{printable(file)}' does not lie in the folder of a run, which would tell of it; name a run's checkpoint"
        )
    return file.parent


def describe(folder: Path) -> str:
    """What a run's folder tells, in Markdown: model, data, recipe, results, commands."""
    config, starts = get_config(folder / "config.yaml"), read_json(folder / "run.json")["starts"]
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
        *(f"- {name}: {value:.4g}" for name, value in _results(folder).items()),
        "\n## Recipe\n",
        "What is not said has the default of docs/config.md.\n",
        *(f"- {key}: {value}" for key, value in _changed(config).items()),
        "\n## How it was made\n",
        *dict.fromkeys(f"    {start['command']}" for start in starts),
        "",
        f"Seed {facts['seed']}, on {', '.join(dict.fromkeys(facts['devices']))}; {versions}; commit {commit}.\n",
    ]
    return "\n".join(lines)


def _results(folder: Path) -> dict[str, float]:
    """Of an evaluation by itself where there was one, else of the last round that was evaluated."""
    if (folder / "evaluation.json").is_file():
        told = read_json(folder / "evaluation.json")
        return _numbers({**told["results"], **told["details"]})
    rounds = [entry for entry in read_metrics(folder / "metrics.jsonl") if "val_loss" in entry or "seconds" in entry]
    apart = ("step", "lr", "grad_norm", "bad_steps", "images_per_second", "memory_mb", "seconds", "unimproved")
    return {name: value for name, value in _numbers(rounds[-1]).items() if name not in apart} if rounds else {}


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
    folder = run_of(checkpoint)
    model = load_model(checkpoint, weights=weights)
    if model.config.TASK != "classification":
        raise UserError(f"the hub's models of timm are classifiers, and this is one of {model.config.TASK}")
    published, settings, arguments = as_timms(model)
    card = {"license": licence, "tags": ["image-classification", "timm", "vmamba"], "description": describe(folder)}
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
