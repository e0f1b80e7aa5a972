"""What to set on a card, in words, from what benchmarks/gpu.py has measured on it."""

from gpu_setup import STAGES

CLEAR = 1.05  # a gain below this factor is none
RESERVE = 0.92  # the share of a card's memory that training may fill


def advice(report):
    """Sentences that follow from the figures of a report; those without figures are left out."""
    sentences = [f"On {report.facts['card']}:"]
    for stage in STAGES:
        sentences += precision_words(report, stage) + compilation_words(report, stage)
    sentences += attention_words(report)
    for stage in STAGES:
        sentences += memory_words(report, stage)
    return sentences + sampling_words(report)


def speed(report, stage, precision, compiled):
    """Steps a second, None where not measured."""
    return report.value("training", stage=stage, precision=precision, compiled=compiled)


def precision_words(report, stage):
    """How much faster bfloat16 and TF32 are than float32."""
    plain = speed(report, stage, "float32", False)
    words = []
    for precision, flag in (("bfloat16", "--amp"), ("tf32", "--tf32")):
        other = speed(report, stage, precision, False)
        if plain and other:
            verdict = "give" if other > CLEAR * plain else "leave out"
            words.append(f"{verdict} {flag} for the {stage}, which trains {other / plain:.2f} "
                         f"times as fast with it ({other:.3g} against {plain:.3g} steps/s).")
    return [words[0].capitalize(), *map(str.capitalize, words[1:])] if words else []


def compilation_words(report, stage):
    """Whether --compile pays, and from which number of steps on."""
    eager, compiled = (speed(report, stage, "bfloat16", on) for on in (False, True))
    seconds = report.value("compilation", stage=stage, precision="bfloat16", compiled=True)
    if not eager or not compiled or seconds is None:
        return []
    if compiled < CLEAR * eager:
        return [f"--compile does not pay for the {stage}: {compiled:.3g} steps/s with it and "
                f"{eager:.3g} without."]
    steps = seconds / (1 / eager - 1 / compiled)
    return [f"--compile pays for the {stage} from {steps:.0f} steps on: {compiled:.3g} steps/s "
            f"with it, {eager:.3g} without, and {seconds:.0f} s of compilation."]


def attention_words(report):
    """Which backend is the fastest at which size, where it is not the one that is chosen."""
    figures = [x for x in report.figures if x["what"] == "attention both ways"]
    cases, words, slower = {}, [], []
    for x in figures:
        case = (x["side"], x["kernels"], x["bias"])
        cases.setdefault(case, {})[x["backend"]] = x["value"]
    for (side, kernels, bias), times in cases.items():
        chosen = times.pop("None", None)
        if not times:
            continue
        best = min(times, key=times.get)
        name = f"{side}x{side} with kernels {kernels}" + (" and bias" if bias else "")
        words.append(f"{name}: {best}, {times[best]:.3g} ms")
        if chosen and chosen > 1.15 * times[best]:
            slower.append(f"{name}: {chosen:.3g} ms against {times[best]:.3g} of {best}")
    sentences = [f"The fastest attention, both ways: {'; '.join(words)}."] if words else []
    if slower:
        sentences.append(f"The rule of backend=None chooses a slower one here: "
                         f"{'; '.join(slower)}.")
    elif words:
        sentences.append("The rule of backend=None chooses the fastest or one within 15% of it.")
    return sentences


def memory_words(report, stage):
    """The largest batches that fit, on a line through the two batches that were measured."""
    total = report.facts.get("memory_bytes")
    cases = {}
    for x in report.figures:
        if x["what"] == "peak memory" and x["stage"] == stage:
            cases.setdefault((x["precision"], x["flags"]), {})[x["batch"]] = x["value"]
    words = []
    for (precision, flags), peaks in cases.items():
        if len(peaks) < 2 or not total:
            continue
        (small, least), (large, most) = sorted(peaks.items())
        an_image = (most - least) / (large - small)
        if an_image <= 0:
            continue
        fits = int((RESERVE * total / 2**20 - least) / an_image) + small
        words.append(f"{fits} in {precision}{' with ' + flags if flags else ''} "
                     f"({least:.0f} MB at {small}, {an_image:.0f} MB an image more)")
    return [f"Batches of the {stage} that should fit: {', '.join(words)}."] if words else []


def sampling_words(report):
    """The fastest sampling method at equal calls, and how long 50,000 samples take."""
    speeds = {x["method"]: x for x in report.figures if x["what"] == "sampling"}
    if "diffusion" not in speeds:
        return []
    plain = speeds["diffusion"]
    return [f"Sampling by diffusion with {plain['calls']} steps gives {plain['value']:.3g} "
            f"samples/s, so 50,000 take {50000 / plain['value'] / 60:.0f} minutes; more steps "
            f"take longer in proportion."]
