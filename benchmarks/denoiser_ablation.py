"""Which attention, positions and optimiser learn fastest: equal steps, several seeds.

    python benchmarks/denoiser_ablation.py --dataset digits --ae_load_dir vqgan_8 \
        --ae_load_step 300 --train_steps 400 --seeds 0 1

Trains one denoiser after another with train_sampler.py, into logs/ablation_*, and prints a
Markdown table: validation bits per token (mean and range over the seeds), milliseconds a step (of
the fastest 50). The last lines say in how much training time the first variant reaches what full
attention with Adam ends at. Flags that this script has not are handed on to every training. A run
that is already there, with the same flags and the same autoencoder, is not trained again.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys

import yaml

from hparams.parser import best_step, step_or_best
from measure import number, print_table
from utils.errors import SettingsError
from utils.logging.logger import read_metrics
from utils.runs.folder import RunFolder

EVERY = 50  # steps between validations and between figures of speed
RECIPE = (
    "--recipe published --optimizer muon --t_sampling low_discrepancy --lr_schedule cosine "
    "--lr 3e-3 --position rpb absolute"
)
FULL_ADAM = "full attention, adam 1e-3"
PUBLISHED = "full attention, adam as published"
# Flags that each variant adds to RECIPE and to the defaults of the dataset. PUBLISHED has the
# published optimiser, learning rate, times and dropout; batch, EMA and warm-up stay those of the
# dataset, since the published ones (30,000 steps of warm-up) are for longer runs.
VARIANTS = {
    "hydra, kernels {small} {large}": "--kernel_sizes {small} {large}",
    "rpb": "--kernel_sizes {small} {large} --position rpb",
    "rope": "--kernel_sizes {small} {large} --position rope",
    "rope + absolute": "--kernel_sizes {small} {large} --position rope absolute",
    "absolute": "--kernel_sizes {small} {large} --position absolute",
    "kernel {small}": "--kernel_sizes {small}",
    "kernel {large}": "--kernel_sizes {large}",
    "kernels {small} {small}, dilations 1 2": "--kernel_sizes {small} {small} --dilations 1 2",
    "uniform t": "--kernel_sizes {small} {large} --t_sampling uniform",
    "gradients clipped to norm 1": "--kernel_sizes {small} {large} --clip_grad_norm 1",
    "adam 1e-3": "--kernel_sizes {small} {large} --optimizer adam --lr 1e-3",
    "lr 6e-3": "--kernel_sizes {small} {large} --lr 6e-3",
    "lr 1.2e-2": "--kernel_sizes {small} {large} --lr 1.2e-2",
    "full attention": "--attention full --position absolute",
    "full attention, lr 6e-3": "--attention full --position absolute --lr 6e-3",
    "full attention, lr 1.2e-2": "--attention full --position absolute --lr 1.2e-2",
    "full attention, lr 2.4e-2": "--attention full --position absolute --lr 2.4e-2",
    FULL_ADAM: "--attention full --position absolute --optimizer adam --lr 1e-3",
    PUBLISHED: "--attention full --position absolute --optimizer adam --lr 2e-4 "
               "--lr_schedule constant --t_sampling uniform --embd_pdrop 0 --resid_pdrop 0",
}


def parse_arguments():
    """(this script's arguments, the flags for train_sampler.py)."""
    parser = argparse.ArgumentParser(
        description="Which attention, positions and optimiser learn fastest. Other flags than "
        "these go to train_sampler.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--ae_load_dir", required=True, help="run of the autoencoder")
    parser.add_argument("--ae_load_step", type=step_or_best, required=True,
                        help="step of its checkpoint, or best")
    parser.add_argument("--train_steps", type=int, default=400, help=f"a multiple of {EVERY}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--kernels", nargs=2, type=int, default=[3, 7], metavar=("SMALL", "LARGE"))
    parser.add_argument("--variants", nargs="+", type=int, metavar="N",
                        help=f"only these, 0 to {len(VARIANTS) - 1} (none: all)")
    arguments, handed_on = parser.parse_known_args()
    if arguments.ae_load_step == "best":
        try:
            arguments.ae_load_step = best_step(arguments.ae_load_dir)
        except SettingsError as error:
            parser.error(str(error))
    if arguments.train_steps % EVERY:
        parser.error(f"--train_steps must be a multiple of {EVERY}, not {arguments.train_steps}")
    return arguments, handed_on


def variant_flags(arguments, title):
    """The flags of train_sampler.py for a variant, but for its seed and its run folder."""
    small, large = arguments.kernels
    return [
        "--sampler", "absorbing", "--dataset", arguments.dataset,
        "--ae_load_dir", arguments.ae_load_dir, "--ae_load_step", str(arguments.ae_load_step),
        "--train_steps", str(arguments.train_steps), "--ema", "--no_visdom",
        "--steps_per_eval", str(EVERY), "--steps_per_log", str(EVERY),
        "--steps_per_checkpoint", str(arguments.train_steps), "--steps_per_save_output", "0",
        *RECIPE.split(), *VARIANTS[title].format(small=small, large=large).split(),
    ]


def train(arguments, flags):
    """Train with these flags unless that has been done; the run's name.

    The name holds a hash of the flags and of the autoencoder's file.
    """
    run = RunFolder(arguments.ae_load_dir)
    files = [run.model(name, arguments.ae_load_step) for name in ("vqgan_ema", "vqgan")]
    weights = next((path.read_bytes() for path in files if path.exists()), b"")
    digest = hashlib.sha256("\n".join(flags).encode() + weights).hexdigest()[:12]
    name = f"ablation_{digest}"
    if not RunFolder(name).model("absorbing_ema", arguments.train_steps).exists():
        command = [sys.executable, "train_sampler.py", "--log_dir", name, *flags]
        output = subprocess.run(command, capture_output=True, text=True)
        if output.returncode:
            sys.exit(f"{' '.join(command)}\n{output.stderr[-2000:]}")
    return name


def curve(name):
    """(seconds a step, [(step, validation bits per token)]) of a run.

    The speed is that of its fastest EVERY steps: what else the machine did does not count, nor
    does validation.
    """
    run = RunFolder(name)
    batch_size = yaml.safe_load(run.hparams.read_text())["batch_size"]
    lines = read_metrics(run.metrics)
    speed = max(line["images_per_second"] for line in lines if line["group"] == "train")
    points = [(x["step"], x["bits_per_token"]) for x in lines if x["group"] == "validation"]
    return batch_size / speed, points


def step_of(points, bits):
    """The step at which a curve first is at `bits` or lower; None if it never is."""
    return next((step for step, value in points if value <= bits), None)


def rows_of_variants(arguments, handed_on, titles, curves):
    """Yield the figures of each variant, and add the curves of its seeds to `curves`."""
    small, large = arguments.kernels
    for title in titles:
        flags = [*variant_flags(arguments, title), *handed_on]
        runs = curves[title] = [
            curve(train(arguments, [*flags, "--seed", str(seed)])) for seed in arguments.seeds
        ]
        bits = [points[-1][1] for _, points in runs]
        milliseconds = 1e3 * min(seconds for seconds, _ in runs)
        yield [title.format(small=small, large=large), number(statistics.mean(bits), 4),
               f"{min(bits):.3f} to {max(bits):.3f}", number(milliseconds)]


def main():
    arguments, handed_on = parse_arguments()
    titles = list(VARIANTS)
    first = titles[0]
    if arguments.variants is not None:
        titles = [titles[index] for index in arguments.variants]
    curves = {}
    print_table(["variant", "bits per token", "seeds", "ms per step"],
                rows_of_variants(arguments, handed_on, titles, curves))
    for baseline in (FULL_ADAM, PUBLISHED):
        if first not in curves or baseline not in curves:
            continue
        for seed, chosen, other in zip(arguments.seeds, curves[first], curves[baseline]):
            (pace, points), (other_pace, other_points) = chosen, other
            last, bits = other_points[-1]
            step = step_of(points, bits)
            reached = ("never is there" if step is None else
                       f"is there at step {step}, after {step * pace:.0f} s")
            print(f"seed {seed}: {baseline} ends at {bits:.3f} bits per token after step {last}, "
                  f"{last * other_pace:.0f} s of training; the first variant {reached}")


if __name__ == "__main__":
    main()
