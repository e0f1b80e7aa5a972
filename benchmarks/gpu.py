"""Is this GPU used right, and how fast is it? One command for any CUDA card, without internet.

    make gpu-check

Checks that both stages train, resume, sample and are measured on the card, that all attention
backends agree, that a training step does not wait for the device, that CUDA graphs compute the
same, and what the published sizes take of its memory; then measures the speed of training,
attention, sampling and measuring. Prints Markdown tables and a paragraph that says what to set on
this card, and writes results/gpu_<card>.json after every part. Nothing is begun once `--minutes`
are spent. The exit code is 1 where a check failed, and 0 on a machine without a card, where there
is nothing that could fail. `--device cpu --tiny` runs all parts at tiny sizes.
"""

import argparse
import importlib
import sys
from functools import partial

import torch
from gpu_advice import advice
from gpu_report import Report
from gpu_setup import Setup, tf32

# The module of each part, which is imported when the part runs: what one lacks, others may not
# need. The most important come first.
PARTS = {
    "attention": "gpu_checks", "waits": "gpu_checks", "graphs": "gpu_checks",
    "matmul": "gpu_speed",
    "training": "gpu_speed", "memory": "gpu_checks", "scripts": "gpu_scripts",
    "backends": "gpu_speed", "sampling": "gpu_speed", "images": "gpu_speed",
    "compiled_autoencoder": "gpu_speed",
}
CHECKS = ("attention", "waits", "graphs", "memory", "scripts")  # the others measure


def run_part(name, setup, report):
    """Run the function `name` of its module."""
    getattr(importlib.import_module(PARTS[name]), name)(setup, report)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Is this GPU used right, and how fast is it?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the parts")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", default="results", help="folder of the JSON file")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the parts; the exit code."""
    arguments = parse_arguments(argv)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA card can be used here, so nothing was checked: run this on a machine with "
              "one, or try its parts with --device cpu --tiny.")
        return 0
    device = arguments.device
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    setup = Setup(device, arguments.tiny)
    report = Report(setup, arguments.out, arguments.minutes)
    report.say(", ".join(f"{name} {value}" for name, value in report.facts.items()))
    # in tiny trials a compiler would take longer than all else
    stance = "default" if setup.on_gpu or not setup.tiny else "force_eager"
    with tf32(False), torch.compiler.set_stance(stance):
        for name in PARTS:
            if name in arguments.parts:
                report.run(name, partial(run_part, name))
    report.words = advice(report)
    report.save()
    print("\n" + report.table())
    print("\n" + " ".join(report.words))
    print(f"\n{report.path}, {report.elapsed:.0f} s")
    bad = ("failed", "not run")  # a part is not run where the card is broken
    failed = [name for name in CHECKS if report.parts.get(name, {}).get("state") in bad]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
