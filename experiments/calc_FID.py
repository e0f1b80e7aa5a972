"""How far do a trained sampler's samples lie from the dataset's images? FID.

    python experiments/calc_FID.py --sampler absorbing --dataset churches --log_dir FID_log \
        --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches \
        --load_step 2000000 --ema --n_samples 50000 --temp 0.9

All images of the dataset are the reference, and its statistics are kept in statistics/. --kid,
--isc and --prc measure more on the same samples. When an interrupted command is given again, the
samples that were drawn need not be drawn again; torchrun's processes divide samples and images
among them. Prints a table and keeps it in logs/<log_dir>/results.json with what it takes to repeat
it.
"""

from hparams import get_fid_hparams
from utils.data.datasets import load_dataset
from utils.evaluation.experiment import experiment
from utils.evaluation.measure import measure
from utils.evaluation.metrics import metrics_asked_for
from utils.runs.script import run_script


def main(argv=None):
    H = get_fid_hparams(argv)
    with experiment(H, "FID") as run:
        dataset = load_dataset(H, run.log)
        run.note_data(dataset)
        run.load_sampler()
        names = ["fid", *metrics_asked_for(H)]
        run.report(measure(run, dataset, run.sample_stream(), names))


if __name__ == "__main__":
    run_script(main)
