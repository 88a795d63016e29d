"""Deliberate mistakes that the tests must catch: python tests/mutants.py [NAME ...]

Each is put into a copy of the repository and the tests beside it are run there; a mistake that they pass is a survivor.
Ends with status 1 where there are any.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = "tests/classification/test_by_hand.py"
RECIPES = "tests/classification/test_recipes.py"
DETECTION, SEGMENTATION = "tests/detection", "tests/segmentation/test_by_hand.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    right: str
    wrong: str
    tests: str  # arguments of pytest


MUTANTS = (
    Mutant(
        "no autocast in training",
        "vmamba/runtime/step.py",
        "with autocast(self.config, self.world.device):",
        "with nullcontext():",
        RUNS,
    ),
    Mutant(
        "no autocast in evaluation",
        "vmamba/runtime/evaluation.py",
        "with autocast(run.config, run.world.device):\n                    meter",
        "with torch.no_grad():\n                    meter",
        RUNS,
    ),
    Mutant(
        "label smoothing twice on mixed targets",
        "vmamba/classification/task.py",
        "smoothing = 0.0  #",
        "smoothing = smoothing  #",
        RUNS,
    ),
    Mutant(
        "no label smoothing without mixing",
        "vmamba/classification/task.py",
        "smoothing = self.config.MODEL.LABEL_SMOOTHING",
        "smoothing = 0.0",
        RUNS,
    ),
    Mutant(
        "micro-batches share stochastic depth",
        "vmamba/runtime/step.py",
        "_mix(self.config.SEED, state.step, micro_step, self.world.rank)",
        "_mix(self.config.SEED, state.step, 0, self.world.rank)",
        RUNS,
    ),
    Mutant(
        "buffers not shared before evaluation",
        "vmamba/runtime/evaluation.py",
        "            share_buffers(model)\n",
        "",
        "tests/classification/test_launch.py -k running_statistics",
    ),
    Mutant(
        "no save before the evaluation",
        "vmamba/runtime/trainer.py",
        "self.run.save(self.state, LAST)  #",
        "pass  #",
        RUNS,
    ),
    Mutant(
        "SAVE_FREQ ignored",
        "vmamba/runtime/plan.py",
        "rounds_per_save=config.SAVE_FREQ",
        "rounds_per_save=1",
        f"{RUNS} tests/runtime/test_plan.py",
    ),
    Mutant(
        "the last epoch unsaved where SAVE_FREQ does not divide it",
        "vmamba/runtime/plan.py",
        "return step >= self.steps or self._rounds(step) % self.rounds_per_save == 0",
        "return self._rounds(step) % self.rounds_per_save == 0",
        f"{RUNS} tests/runtime/test_plan.py",
    ),
    Mutant(
        "EMA.WARMUP ignored",
        "vmamba/runtime/average.py",
        "use_warmup=ema.WARMUP",
        "use_warmup=False",
        RUNS,
    ),
    Mutant(
        "without EMA.WARMUP the first average is the first weights",
        "vmamba/runtime/step.py",
        'return state.step if ema.WARMUP or ema.KIND == "mean" else None',
        "return state.step",
        RUNS,
    ),
    Mutant(
        "where the optimiser skips by itself it is not told of a bad loss",
        "vmamba/runtime/step.py",
        "state.optimizer.found_inf = (~good).float()",
        "state.optimizer.found_inf = torch.zeros(())",
        "tests/runtime/test_step.py",
    ),
    Mutant(
        "the average moves in a bad step that only the device knows",
        "vmamba/runtime/step.py",
        "_foreach_mul(weights, good.float())",
        "_foreach_mul(weights, torch.ones(()))",
        "tests/runtime/test_step.py",
    ),
    Mutant(
        "patches of random erasing in the next image",
        "vmamba/classification/transforms.py",
        "[(number, patch) for number, pixels in enumerate(each)",
        "[(number, patch) for number, pixels in enumerate(each, -1)",
        "tests/classification/test_data.py -k bytes",
    ),
    Mutant(
        "an image's last operation first",
        "vmamba/classification/on_device.py",
        "operation = operations.pop(0)",
        "operation = operations.pop()",
        "tests/classification/test_on_device.py",
    ),
    Mutant(
        "images of the loading process in the places of the GPU's",
        "vmamba/classification/nvjpeg.py",
        "((seen, files.places), (ready, others))",
        "((seen, range(len(seen))), (ready, range(len(seen), len(images))))",
        "tests/classification/test_nvjpeg.py -k torchvision",
    ),
    Mutant(
        "USE_CHECKPOINT without effect",
        "vmamba/models/variants.py",
        "    )\n    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)",
        "    )\n    model.set_grad_checkpointing(False)",
        RUNS,
    ),
    Mutant(
        "TF32 always on",
        "vmamba/runtime/precision.py",
        '"high" if config.TF32 else "highest"',
        '"high"',
        RUNS,
    ),
    Mutant(
        "TF32 of convolutions always on",
        "vmamba/runtime/precision.py",
        "torch.backends.cudnn.allow_tf32 = config.TF32",
        "torch.backends.cudnn.allow_tf32 = True",
        RUNS,
    ),
    Mutant(
        "START_EPOCH leaves the step at 0",
        "vmamba/runtime/start.py",
        "        step=start,\n",
        "        step=0,\n",
        RUNS,
    ),
    Mutant(
        "the best accuracy of the average forgotten",
        "vmamba/runtime/trainer.py",
        "for key in set(kinds.values()) & results.keys():",
        "for key in {name} & results.keys():",
        RUNS,
    ),
    Mutant(
        "the epoch's loss carried over",
        "vmamba/runtime/state.py",
        "self.round_loss, self.round_grad_norm, self.round_good_steps = 0.0, 0.0, 0",
        "pass",
        RUNS,
    ),
    Mutant(
        "mixing drawn once for all processes",
        "vmamba/classification/transforms.py",
        "seed_generators(config.SEED, MIXUP, step, part)",
        "seed_generators(config.SEED, MIXUP, step)",
        "tests/classification/test_data.py -k mixup",
    ),
    Mutant(
        "the newest file resumed, not the furthest state",
        "vmamba/runtime/checkpoint.py",
        'states.append((_position(content), path.stem == "last", path))',
        'states.append((path.stat().st_mtime_ns, path.stem == "last", path))',
        "tests/runtime/test_checkpoint.py",
    ),
    Mutant(
        "loading processes obey SIGTERM",
        "vmamba/data/loaders.py",
        "    leave_them_to_the_parent()\n",
        "    pass\n",
        "tests/data/test_loaders.py",
    ),
    Mutant(
        "a stop signal waits for the end of the evaluation",
        "vmamba/runtime/evaluation.py",
        "            if run.request.noted:\n                break\n",
        "",
        "tests/classification/test_resume.py -k evaluation",
    ),
    Mutant(
        "a changed optimiser without effect on resuming",
        "vmamba/runtime/optim.py",
        'CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps", "momentum", "fused")',
        'CONFIGURED = ("initial_lr", "weight_decay")',
        "tests/runtime/test_state.py",
    ),
    Mutant(
        "an evaluation of NaN may be the best",
        "vmamba/runtime/trainer.py",
        "if not math.isfinite(value)]",
        "if False]",
        "tests/classification/test_run.py -k finite",
    ),
    Mutant(
        "anchors about the middle of their cells",
        "vmamba/detection/boxes.py",
        "columns = torch.arange(size[1], device=device, dtype=torch.float32) * stride",
        "columns = (torch.arange(size[1], device=device, dtype=torch.float32) + 0.5) * stride",
        f"{DETECTION}/test_boxes.py",
    ),
    Mutant(
        "no anchor stands for a truth that it overlaps little",
        "vmamba/detection/boxes.py",
        "assigned = torch.where(low >= 0, low, assigned)",
        "assigned = assigned",
        f"{DETECTION}/test_boxes.py",
    ),
    Mutant(
        "as many proposals as there are",
        "vmamba/detection/rpn.py",
        ".nonzero()[: settings.max_per_img, 0]",
        ".nonzero()[:, 0]",
        f"{DETECTION}/test_boxes.py",
    ),
    Mutant(
        "as many proposals in training as in evaluation",
        "vmamba/detection/mask_rcnn.py",
        "image_sizes, self.training_proposals)",
        "image_sizes, self.proposals)",
        f"{DETECTION}/test_run.py -k proposals",
    ),
    Mutant(
        "anchors of the batch's padding count",
        "vmamba/detection/task.py",
        'batch["targets"], batch["padded_sizes"])',
        'batch["targets"])',
        f"{DETECTION}/test_run.py -k padding",
    ),
    Mutant(
        "crowds are objects",
        "vmamba/detection/annotations.py",
        'return "crowds", None',
        "pass",
        f"{DETECTION}/test_data.py",
    ),
    Mutant(
        "classes of detection in the order of the file",
        "vmamba/detection/annotations.py",
        "enumerate(sorted(categories))",
        "enumerate(categories)",
        f"{DETECTION}/test_data.py",
    ),
    Mutant(
        "results name labels, not the file's categories",
        "vmamba/detection/evaluation.py",
        '"category_id": numbers[label],',
        '"category_id": label,',
        f"{DETECTION}/test_evaluation.py",
    ),
    Mutant(
        "masks stay where their image is mirrored",
        "vmamba/detection/transforms.py",
        "parts = tuple(V.horizontal_flip(part) for part in parts)",
        "parts = (*(V.horizontal_flip(part) for part in parts[:2]), parts[2])",
        f"{DETECTION}/test_data.py",
    ),
    Mutant(
        "pixels that do not count are right or wrong",
        "vmamba/segmentation/evaluation.py",
        "truth.long() * self.classes + predicted, self.classes**2)",
        "truth.long() * self.classes + predicted, predicted.long())",
        SEGMENTATION,
    ),
    Mutant(
        "the loss is a mean over the pixels that count",
        "vmamba/segmentation/upernet.py",
        "weight * losses.mean()",
        "weight * losses.sum() / counts.sum().clamp(min=1)",
        f"{SEGMENTATION} tests/segmentation/test_golden.py",
    ),
    Mutant(
        "windows are added up where they overlap",
        "vmamba/segmentation/evaluation.py",
        "return total / count",
        "return total",
        SEGMENTATION,
    ),
    Mutant(
        "labels of ADE20K count from one",
        "vmamba/segmentation/datasets.py",
        "np.where(values == 0, self.ignored, values - 1)",
        "np.where(values == 0, self.ignored, values)",
        "tests/segmentation/test_data.py",
    ),
    Mutant(
        "one mirrored prediction is not mirrored back",
        "vmamba/segmentation/evaluation.py",
        "logits.flip(-1) if flip else logits, size",
        "logits, size",
        SEGMENTATION,
    ),
    Mutant(
        "patience is not kept in a checkpoint",
        "vmamba/runtime/state.py",
        '    "unimproved",\n    "best_weights",',
        '    "best_weights",',
        "tests/classification/test_resume.py",
    ),
    Mutant(
        "an image that comes again looks the same",
        "vmamba/data/sampling.py",
        "keys.append((index, again) if again else (index,))",
        "keys.append((index,))",
        "tests/data/test_sampling.py",
    ),
    Mutant(
        "repeated images go to one process",
        "vmamba/data/loaders.py",
        "if not self.deal:",
        "if True:",
        "tests/data/test_sampling.py",
    ),
    Mutant(
        "frozen parts train as the others",
        "vmamba/models/freezing.py",
        "nn.Module.train(module, False)",
        "pass",
        "tests/models/test_freezing.py",
    ),
    Mutant(
        "predictions are of other images where one is unreadable",
        "vmamba/data/loaders.py",
        "self.given += [keys[place][1] for place in kept]",
        "self.given += [keys[place][1] for place in range(len(kept))]",
        "tests/classification/test_fine_tuning.py",
    ),
    Mutant(
        "neighbours vote alike",
        "vmamba/analysis/knn.py",
        "((similarity - similarity[:, :1]) / temperature).exp()",
        "torch.ones_like(similarity)",
        "tests/analyze/test_knn.py",
    ),
    Mutant(
        "a registered loss is not smoothed",
        "vmamba/classification/task.py",
        "* (1 - smoothing) + smoothing / classes",
        "* 1.0",
        "tests/classification/test_extensions.py",
    ),
    Mutant(
        "MESA's teacher is the model itself",
        "vmamba/classification/task.py",
        "told = self.average(images)",
        "told = model(images)",
        RECIPES,
    ),
    Mutant(
        "a teacher sees images by the student's mean",
        "vmamba/classification/teachers.py",
        "self.model(images * self.scale + self.shift)",
        "self.model(images)",
        RECIPES,
    ),
    Mutant(
        "images do not grow over the run",
        "vmamba/classification/sizes.py",
        "min(epoch / (self.plan.epochs - 1), 1.0)",
        "0.0",
        RECIPES,
    ),
    Mutant(
        "the mean of the last epochs counts one too many",
        "vmamba/runtime/average.py",
        "max(self.epochs - 1 - left, 0)",
        "max(self.epochs - left, 0)",
        "tests/runtime/test_average.py",
    ),
    Mutant(
        "a run does not go on from its average",
        "vmamba/runtime/step.py",
        "take_over(state.ema, state.model)",
        "pass",
        "tests/classification/test_every_key.py -k SWITCH",
    ),
    Mutant(
        "Muon moves the classifier",
        "vmamba/runtime/optim.py",
        "for end in (first, *heads)",
        "for end in (first,)",
        "tests/runtime/test_optim.py",
    ),
    Mutant(
        "a scan of means skips with the mean",
        "vmamba/models/ss2d.py",
        "(y + x * D.flatten(1).sum(0))",
        "(y + means * D.flatten(1).sum(0))",
        "tests/models/test_ablations.py",
    ),
    Mutant(
        "blocks all take the first routes",
        "vmamba/models/options.py",
        "share, turn = len(routes) // turns, number % turns",
        "share, turn = len(routes) // turns, 0",
        "tests/models/test_ablations.py",
    ),
    Mutant(
        "a class that a map leaves out is an answer",
        "vmamba/classification/task.py",
        "logits.masked_fill(self.left_out, -torch.inf)",
        "logits.masked_fill(self.left_out, 0.0)",
        "tests/classification/test_evaluation_sets.py",
    ),
    Mutant(
        "a run that is finished is made again",
        "vmamba/analysis/ablation.py",
        "if not each.is_done]",
        "]",
        "tests/analyze/test_ablation.py",
    ),
)


def survives(mutant: Mutant, copy: Path) -> bool:
    path = copy / mutant.file
    text = path.read_text()
    assert text.count(mutant.right) == 1, f"{mutant.name}: {mutant.file} has not once: {mutant.right}"
    path.write_text(text.replace(mutant.right, mutant.wrong))
    command = f"exec {sys.executable} -m pytest -q -x {mutant.tests}"
    path_of_packages = f"{copy}:{copy / 'kernels'}"
    done = subprocess.run(
        ["env", f"PYTHONPATH={path_of_packages}", "sh", "-c", command], cwd=copy, capture_output=True, text=True
    )
    path.write_text(text)
    if done.returncode not in (0, 1):  # tests that could not run catch nothing
        raise SystemExit(f"{mutant.name}: {done.stdout}{done.stderr}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "repository")
        left_out = shutil.ignore_patterns(".git", ".venv", "output", "__pycache__", ".pytest_cache")
        shutil.copytree(ROOT, copy, ignore=left_out)
        for mutant in chosen:
            if survives(mutant, copy):
                survivors.append(mutant.name)
            print(f"{'SURVIVES' if mutant.name in survivors else 'caught':9} {mutant.name}", flush=True)
    print(f"{len(chosen)} mistakes, {len(survivors)} survivors")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
