"""What to set on a card, in words, from what benchmarks/gpu.py has measured on it."""

from gpu_setup import STAGES, out_of_memory

CLEAR = 1.05  # a gain below this factor is none
NEAR = 1.15  # a backend within this factor of the fastest is a good choice
RESERVE = 0.92  # the share of a card's memory that training may fill
MEGABYTE = 2**20


def advice(report):
    """Sentences that follow from the figures of a report; those without figures are left out."""
    sentences = []
    for stage in STAGES:
        sentences += precision_words(report, stage)
        sentences += too_large_words(report, stage)
        sentences += blaming_words(report, stage) or compilation_words(report, stage)
        sentences += graphs_words(report, stage)
        sentences += memory_words(report, stage)
    sentences += attention_words(report) + sampling_words(report)
    failed = [name for name, part in report.parts.items() if part["state"] == "failed"]
    if failed:
        sentences.append(f"Not all is well: {', '.join(failed)} failed, see above.")
    first = [f"On {report.facts['card']}:", *amp_words(report)]
    return [*first, *sentences] if sentences else []


def speed(report, stage, precision):
    """Steps a second where nothing is compiled, in the fastest of the ways measured; None where
    there is none."""
    found = report.values("training", stage=stage, precision=precision, compiled=False)
    return max(found, default=None)


def amp_words(report):
    """What --amp is on a card without bfloat16."""
    if report.facts["amp"] == "bfloat16":
        return []
    found = report.facts["compute_capability"]
    return [f"This card has no bfloat16 (compute capability {found}; 8.0 has it): --amp computes "
            f"in float16 with a gradient scaler, which passes over a step where gradients overflow "
            f"and then lowers its scale."]


def precision_words(report, stage):
    """Whether --amp pays, and TF32 where it is not given."""
    names = ("float32", "tf32", report.facts["amp"])
    plain, tf32, half = (speed(report, stage, name) for name in names)
    words = []
    if half and (tf32 or plain):
        other = max(filter(None, (tf32, plain)))
        verdict = "Give" if half > CLEAR * other else "Leave out"
        words.append(f"{verdict} --amp for the {stage}: {half:.3g} steps/s with it, {other:.3g} "
                     f"without.")
    if tf32 and plain:
        verdict = "Leave TF32 on" if tf32 > CLEAR * plain else "--no_tf32 costs nothing"
        words.append(f"{verdict} where the {stage} is trained without --amp: {tf32:.3g} steps/s "
                     f"with TF32, {plain:.3g} without.")
    return words


def failures(report, stage):
    """The ways to train a stage that failed, as checks: by memory, and by anything else."""
    failed = [check for check in report.checks
              if check["what"] == "trains at published sizes" and not check["holds"]
              and check["stage"] == stage]
    by_memory = [check for check in failed if out_of_memory(check["detail"])]
    return by_memory, [check for check in failed if check not in by_memory]


def too_large_words(report, stage):
    """In which ways the published sizes do not fit into memory."""
    names = [
        check["precision"] + ", compiled" * check["compiled"]
        + ", with CUDA graphs" * check["graphs"] for check in failures(report, stage)[0]
    ]
    if not names:
        return []
    return [f"Training of the {stage} runs out of memory here in {'; in '.join(names)}: "
            f"docs/gpu.md says what to do where memory is short."]


def blaming_words(report, stage):
    """Which flag lets the stage train where its default fails: one without which it did."""
    for check in failures(report, stage)[1]:
        way = {name: check[name] for name in ("stage", "precision", "compiled", "graphs")}
        for name, flag in (("compiled", "--no_compile"), ("graphs", "--no_cuda_graphs")):
            if check[name] and report.values("training", **{**way, name: False}):
                return [f"Give {flag} for the {stage}, which fails without here "
                        f"({check['detail'][:150]})."]
    return []


def compilation_words(report, stage):
    """Whether --compile pays, and from which number of steps on."""
    for graphs in (True, False):
        about = dict(stage=stage, precision=report.facts["amp"], graphs=graphs)
        eager, compiled = (report.value("training", compiled=on, **about) for on in (False, True))
        before, after = (report.value("preparation", compiled=on, **about) or 0.0
                         for on in (False, True))
        if not eager or not compiled:
            continue
        if compiled < CLEAR * eager:
            return [f"Give --no_compile for the {stage}: {compiled:.3g} steps/s compiled, "
                    f"{eager:.3g} not."]
        steps = max(0, after - before) / (1 / eager - 1 / compiled)
        return [f"Give --compile for the {stage}, or leave it on, where it trains for more than "
                f"{steps:.0f} steps: {compiled:.3g} steps/s compiled after {after:.0f} s, "
                f"{eager:.3g} not."]
    return []


def graphs_words(report, stage):
    """Whether CUDA graphs pay."""
    amp = report.facts["amp"]
    for compiled in (True, False):
        about = dict(stage=stage, precision=amp, compiled=compiled)
        plain, replayed = (report.value("training", graphs=on, **about) for on in (False, True))
        if plain and replayed:
            verdict = ("Leave --cuda_graphs on" if replayed > CLEAR * plain
                       else "--no_cuda_graphs costs nothing")
            return [f"{verdict} for the {stage}: {replayed:.3g} steps/s with them, {plain:.3g} "
                    f"without."]
    return []


def memory_words(report, stage):
    """The largest batches that fit, on a line through the two batches that were measured."""
    total = report.facts.get("memory_bytes")
    cases = {}
    for x in report.figures:
        if x["what"] == "peak memory" and x["stage"] == stage:
            cases.setdefault((x["precision"], x["flags"]), {})[x["batch"]] = x["value"]
    fitting, too_large = [], []
    for (precision, flags), peaks in cases.items():
        name = f"{precision} {flags}".strip()
        (small, least), *larger = sorted(peaks.items())
        if least is None:
            too_large.append(f"{small} in {name}")
        elif not larger or larger[0][1] is None:
            fitting.append(f"{small} in {name}")
        elif total and larger[0][1] > least:
            large, most = larger[0]
            each = (most - least) / (large - small)
            most_images = small + int((RESERVE * total / MEGABYTE - least) / each)
            fitting.append(f"{most_images} in {name} ({least:.0f} MB for {small}, {each:.0f} MB "
                           f"for each more)")
    words = []
    if fitting:
        words.append(f"Batches of the {stage} that fit: {', '.join(fitting)}.")
    if too_large:
        words.append(f"The published batch of the {stage} does not fit: {', '.join(too_large)}; "
                     f"give --accumulate or --checkpoint_blocks.")
    return words


def attention_words(report):
    """Which backend is the fastest at which size, and whether that one is chosen."""
    cases, words, slower = {}, [], []
    for x in report.figures:
        if x["what"] == "attention both ways":
            case = (x["side"], x["kernels"], x["bias"])
            cases.setdefault(case, {})[x["backend"]] = x["value"]
    for (side, kernels, bias), times in cases.items():
        chosen = times.pop("None", None)
        if not times:
            continue
        best = min(times, key=times.get)
        name = f"{side}x{side}, kernels {kernels}" + (" with bias" if bias else "")
        words.append(f"{name}: {best}, {times[best]:.3g} ms")
        if chosen and chosen > NEAR * times[best]:
            slower.append(f"{name}: {chosen:.3g} ms instead of {times[best]:.3g} by {best}")
    if not words:
        return []
    verdict = ("The rule of backend=None takes the fastest, or one within 15% of it." if not slower
               else f"The rule of backend=None takes a slower one at {'; '.join(slower)}.")
    return [f"The fastest attention, both ways: {'; '.join(words)}.", verdict]


def sampling_words(report):
    """How long 50,000 samples take."""
    found = [x for x in report.figures if x["what"] == "sampling" and x["method"] == "diffusion"]
    return [
        f"Sampling by diffusion in {x['calls']} steps gives {x['value']:.3g} samples/s: 50,000 "
        f"take {50000 / x['value'] / 60:.3g} minutes, and more steps take longer in proportion."
        for x in found
    ]
