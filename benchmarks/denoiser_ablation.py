"""Which attention, positions and optimiser learn fastest: equal steps, several seeds.

    python benchmarks/denoiser_ablation.py --ae_load_dir demo_vqgan --ae_load_step 400 \
        --dataset digits --train_steps 400 --seeds 0 1

Trains one denoiser after another with train_sampler.py, into logs/ablation_*, and prints a
Markdown table: validation bits per token (mean and range over the seeds), milliseconds a step.
The last lines say in how much training time the first variant reaches what full attention with
Adam ends at. A run that is already there is not trained again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys

import yaml

from hparams.runs import RunFolder
from measure import number, table

# Flags that each variant adds to the recipe and to the defaults of the dataset. PUBLISHED is the
# recipe of Unleashing Transformers, but for the warm-up, which there is longer than these runs.
RECIPE = "--optimizer muon --t_sampling low_discrepancy --lr_schedule cosine --lr 3e-3"
PUBLISHED = (
    "--attention full --optimizer adam --t_sampling uniform --lr_schedule constant --lr 2e-4"
)
VARIANTS = {
    "hydra {small} {large}, rpb + absolute": "--kernel_sizes {small} {large}",
    "rpb": "--kernel_sizes {small} {large} --position rpb",
    "rope": "--kernel_sizes {small} {large} --position rope",
    "rope + absolute": "--kernel_sizes {small} {large} --position rope absolute",
    "absolute": "--kernel_sizes {small} {large} --position absolute",
    "kernel {small}": "--kernel_sizes {small}",
    "kernel {large}": "--kernel_sizes {large}",
    "kernels {small} {small}, dilations 1 2": "--kernel_sizes {small} {small} --dilations 1 2",
    "uniform t": "--kernel_sizes {small} {large} --t_sampling uniform",
    "adam": "--kernel_sizes {small} {large} --optimizer adam --lr 1e-3",
    "full attention, the same recipe": "--attention full",
    "full attention, adam": "--attention full --optimizer adam --lr 1e-3",
    "full attention, published recipe": PUBLISHED,
}
FULL_ADAM, PUBLISHED_ADAM = len(VARIANTS) - 2, len(VARIANTS) - 1


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Which attention, positions and optimiser learn fastest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ae_load_dir", required=True, help="run of the autoencoder")
    parser.add_argument("--ae_load_step", required=True, help="step of its checkpoint")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--train_steps", type=int, default=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--kernel_sizes", nargs=2, type=int, default=[3, 7],
                        help="the small and the large kernel")
    parser.add_argument("--variants", nargs="+", type=int, metavar="N",
                        help=f"only these, 0 to {len(VARIANTS) - 1} (none: all)")
    parser.add_argument("--name", default="ablation", help="how the runs' folders begin")
    return parser.parse_args()


def train(arguments, name, flags, seed):
    """The metrics of a finished run: its lines of metrics.jsonl."""
    folder = RunFolder(name)
    if not folder.model("absorbing_ema", arguments.train_steps).exists():
        shutil.rmtree(folder.path, ignore_errors=True)
        command = [
            sys.executable, "train_sampler.py", "--sampler", "absorbing", "--log_dir", name,
            "--dataset", arguments.dataset, "--ae_load_dir", arguments.ae_load_dir,
            "--ae_load_step", arguments.ae_load_step, "--seed", str(seed), "--ema", "--no_visdom",
            "--train_steps", str(arguments.train_steps), "--steps_per_eval", "50",
            "--steps_per_log", "50", "--steps_per_checkpoint", "0", "--steps_per_save_output", "0",
            *RECIPE.split(), *flags.split(),
        ]
        output = subprocess.run(command, capture_output=True, text=True)
        if output.returncode:
            sys.exit(f"{' '.join(command)}\n{output.stderr[-2000:]}")
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def curve(name, metrics):
    """[(training seconds, validation bits per token)] of a run; validation time is not counted."""
    batch_size = yaml.safe_load(RunFolder(name).hparams.read_text())["batch_size"]
    points, seconds, last = [], 0.0, 0
    for line in metrics:
        if line["group"] == "train":
            seconds += (line["step"] - last) * batch_size / line["images_per_second"]
            last = line["step"]
        elif line["group"] == "validation":
            points.append((seconds, line["bits_per_token"]))
    return points


def time_to(points, bits):
    """Training seconds after which a curve first is at `bits` or lower; None if it never is."""
    return next((seconds for seconds, value in points if value <= bits), None)


def main():
    arguments = parse_arguments()
    small, large = arguments.kernel_sizes
    rows, curves = [], {}
    for number_, (title, flags) in enumerate(VARIANTS.items()):
        if arguments.variants is not None and number_ not in arguments.variants:
            continue
        title, flags = (text.format(small=small, large=large) for text in (title, flags))
        names = [f"{arguments.name}_{number_}_{seed}" for seed in arguments.seeds]
        runs = [
            curve(name, train(arguments, name, flags, seed))
            for name, seed in zip(names, arguments.seeds)
        ]
        curves[number_] = runs
        last = [run[-1][1] for run in runs]
        milliseconds = [1e3 * run[-1][0] / arguments.train_steps for run in runs]
        rows.append([
            title, number(statistics.mean(last), 4), f"{min(last):.3f} to {max(last):.3f}",
            number(min(milliseconds)),
        ])
        print(*rows[-1], sep=", ", flush=True)
    print("\n" + table(["variant", "bits per token", "seeds", "ms per step"], rows) + "\n")
    for baseline, title in ((PUBLISHED_ADAM, "published recipe"), (FULL_ADAM, "adam")):
        if 0 in curves and baseline in curves:
            for seed, chosen, other in zip(arguments.seeds, curves[0], curves[baseline]):
                seconds, bits = other[-1]
                reached = time_to(chosen, bits)
                print(f"seed {seed}: full attention, {title}: {bits:.3f} bits per token in "
                      f"{seconds:.0f} s; the first variant is there in {number(reached)} s")


if __name__ == "__main__":
    main()
