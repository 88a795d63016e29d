"""Submit what main.py would run to SLURM: python classification/submit.py --cfg configs/vmamba_tiny.yaml --nodes 2

Takes main.py's flags and those of the job.  Before its time limit, or when it is preempted, the run saves, is requeued
and resumes.
"""

import sys
from pathlib import Path

# This checkout's packages, whatever else is called so.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmamba.commands.parser import whole
from vmamba.config import argument_parser, config_from_args, output_folder
from vmamba.config.keys import LARGEST_SEED
from vmamba.errors import UserError
from vmamba.runtime.cli import exit_code
from vmamba.runtime.slurm import (
    Job,
    Resources,
    check_local,
    each_once,
    gpus_of_a_node,
    minutes,
    one_line,
    pair,
    sbatch_file,
    seeded,
    submit,
)
from vmamba.runtime.trainer import run


def main() -> None:
    parser = argument_parser(__doc__, without=("dry-run",))
    job = parser.add_argument_group("the job")
    job.add_argument("--nodes", type=whole(1), default=1)
    job.add_argument(
        "--gpus-per-node",
        type=whole(0),
        help="one process each; 0: one process on the CPU (default: 8; with --local those of this machine)",
    )
    job.add_argument("--cpus-per-gpu", type=whole(1), default=8)
    job.add_argument(
        "--time", default="3-0", help="limit of one submission: minutes, H:M:S or D-H:M:S (default: %(default)s)"
    )
    job.add_argument("--partition", type=one_line)
    job.add_argument("--account", type=one_line)
    job.add_argument("--qos", type=one_line)
    job.add_argument("--constraint", type=one_line)
    job.add_argument("--comment", type=one_line)
    job.add_argument("--exclude", type=one_line, metavar="NODES")
    job.add_argument(
        "--slurm-additional",
        dest="additional",
        type=pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY[=VALUE]",
        help="any other option of sbatch",
    )
    job.add_argument(
        "--seeds", type=whole(0, LARGEST_SEED), nargs="+", help="a job for each, as an array; folders TAG-seed"
    )
    job.add_argument("--local", action="store_true", help="run on this machine instead, and wait for the end")
    job.add_argument(
        "--dry-run",
        dest="printed",
        action="store_true",
        help="print what would be submitted (a job that is one: --opts DRY_RUN true)",
    )
    args = parser.parse_args()

    config = config_from_args(args)
    folder = output_folder(config) / "jobs"
    own = ("minutes", "grace", "additional")
    asked = {name: getattr(args, name) for name in Resources.__dataclass_fields__ if name not in own}
    asked["gpus_per_node"] = gpus_of_a_node(args.gpus_per_node, args.local)
    each_once([name for name, _ in args.additional], "--slurm-additional")
    resources = Resources(minutes(args.time), grace=config.GRACE, additional=dict(args.additional), **asked)
    configs = [seeded(config, seed) for seed in each_once(args.seeds, "--seeds")] if args.seeds else [config]
    if args.local:
        check_local(resources)
    if args.printed:
        print(resources if args.local else sbatch_file(resources, folder), *configs, sep="\n")
        return
    for job in submit([Job(run, each) for each in configs], resources, folder, args.local):
        print(f"job {job.job_id}; its logs: {job.paths.stdout} and {job.paths.stderr}", flush=True)
        if args.local:
            if job.exception() is not None:
                raise UserError(f"job {job.job_id} failed; {job.paths.stderr} says why")
            print(f"job {job.job_id} is done: {job.results()[0]}")


if __name__ == "__main__":
    sys.exit(exit_code(main, resumes=True))
