"""What the tabs of the page share: settings of sampling, a line that tells how it goes, files."""

import functools
import html
import json
import random
import traceback

import gradio as gr

from models.sampling.samplers import SAMPLERS
from utils.errors import UserError
from utils.runs.script import is_out_of_memory
from utils.web.records import as_json
from utils.web.studio import MOST_STEPS, names_only

METHODS = {
    "diffusion": "diffusion: at random times",
    "first_hitting": "first hitting: one id at a time",
    "confidence": "MaskGIT: the surest ids first",
    "halton": "Halton: far apart ids first",
    "remdm": "ReMDM: also takes ids back",
    "mlm": "mask-predict: again and again",
    "raster": "raster: row by row",
}
TURN = dict(concurrency_id="model", concurrency_limit=1)  # visitors are served one after another
NO_MEMORY = "there is not enough memory: ask for fewer images, or for smaller ones"
OUR_ERROR = "this failed, and not by your fault: the log.txt of the page says how"


# --- the line that tells how it goes


def running(step, what="network calls"):
    """HTML of a bar: how far a Step is."""
    share = 100 * step.done / max(1, step.total)
    return (f'<div class="told"><div class="bar"><i style="width:{share:.0f}%"></i></div>'
            f'<span>{step.done:,} of {step.total:,} {what}, {step.seconds:.1f} s</span></div>')


def done(sentence):
    """HTML of what is finished."""
    return f'<div class="told done">{html.escape(sentence)}</div>'


WAITING = done("Waiting for the model …")


def stopped(told):
    """What a line that says `told`, HTML, says after Stop: it stays where nothing runs."""
    is_running = told == WAITING or '<div class="bar">' in str(told)
    return done("Stopped.") if is_running else gr.skip()


def wrong(sentence):
    """HTML of what a visitor did wrong, in one sentence."""
    sentence = names_only(sentence)
    sentence = sentence[:1].upper() + sentence[1:]
    return f'<div class="told wrong">{html.escape(sentence)}</div>'


def cost(drawn, what):
    """What was drawn and what it took, in words."""
    return f"{what} in {drawn.seconds:.2f} s, {counted(drawn.calls, 'network call')}"


def counted(count, what):
    """`3 images`, `1 image`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def status_line(sentence):
    """The line of a tab."""
    return gr.HTML(f'<div class="told">{html.escape(sentence)}</div>', elem_classes="status")


def telling(status, log, *emptied):
    """Decorator of a handler that yields {component: value}: an error is told by the line `status`,
    and the components `emptied` show nothing. Where it is none of a visitor's, the log.txt of a
    RunLogger gets its traceback."""
    def decorate(handler):
        @functools.wraps(handler)
        def guarded(*arguments):
            try:
                yield from handler(*arguments)
                return
            except UserError as error:
                sentence = str(error)
            except Exception as error:
                log.to_file("ERROR", f"unexpected {type(error).__name__}", traceback.format_exc())
                sentence = NO_MEMORY if is_out_of_memory(error) else OUR_ERROR
            yield {status: wrong(sentence), **dict.fromkeys(emptied)}

        return guarded

    return decorate


# --- settings of sampling


class Choices:
    """The components by which a visitor chooses how to draw: `inputs`, in the order of Choice, or
    `method`, `steps` and `temp` alone where no `count` is given."""

    def __init__(self, studio, count=None, most=None, steps=None):
        H, absorbing = studio.run.H, studio.is_absorbing
        if count:
            self.count = gr.Slider(1, most, value=min(count, most), step=1,
                                   label="How many images")
        self.method = gr.Dropdown(
            [(METHODS.get(name, name), name) for name in SAMPLERS], value=H.sample_type,
            label="Sampling method", visible=absorbing, filterable=False,
        )
        self.steps = gr.Slider(
            1, max(MOST_STEPS, H.sample_steps), value=steps or H.sample_steps, step=1,
            visible=absorbing, label="Steps",
            info="More are slower and better; each draws some ids",
        )
        self.temp = gr.Slider(0.1, 2, value=H.temp, step=0.05, label="Temperature",
                              info="Lower is safer, higher more diverse")
        if count:
            self.seed = seed_row(H.seed)

    @property
    def inputs(self):
        return [self.count, self.method, self.steps, self.temp, self.seed]


def seed_row(value):
    """A number for the seed, and a button that draws another one."""
    with gr.Row(equal_height=True):
        seed = gr.Number(value, label="Seed", scale=3, min_width=120,
                         info="The same seed and number, the same images")
        another = gr.Button("Another", scale=1, min_width=90, size="md", elem_classes="another")
    another.click(lambda: random.randrange(10**6), outputs=seed, queue=False,
                  api_visibility="private")
    return seed


# --- buttons and files


def buttons(verb):
    """(the button that begins, the one that stops)."""
    with gr.Row():
        return (gr.Button(verb, variant="primary", scale=2, min_width=120),
                gr.Button("Stop", scale=1, min_width=80))


def starts(button, stop, handler, inputs, outputs, status):
    """Let a button run a handler, one at a time for all visitors, and another one stop it."""
    event = button.click(  # at once, whoever else's turn it is
        None, None, status, js=f"() => {json.dumps(WAITING)}", api_visibility="private",
    ).then(
        handler, inputs, outputs, show_progress="minimal", show_progress_on=status,
        api_visibility="private", **TURN,
    )
    stop.click(None, cancels=[event], queue=False).then(
        stopped, status, status, queue=False, show_progress="hidden",
        api_visibility="private",
    )


def caption(text):
    """A line above a picture, which a label of gradio's would lie on."""
    gr.HTML(html.escape(text), elem_classes="caption")


def picture(text, crisp=True):
    """An image below a line of text; where it is `crisp` each of its pixels is a square."""
    with gr.Column(min_width=240, elem_classes="figure"):
        caption(text)
        return gr.Image(label=text, show_label=False, interactive=False, format="png", type="pil",
                        buttons=["fullscreen"],
                        elem_classes="pixels" if crisp else None)


def save_buttons(*labels):
    """Buttons that save pictures, and one that saves how they came about."""
    with gr.Row():
        return [gr.DownloadButton(label, interactive=False, min_width=160, size="md")
                for label in (*labels, "Save how it came about (JSON)")]


def file_to_save(name, content):
    """Update of a button of `save_buttons`: it saves the bytes `content` as a file `name`."""
    cache = gr.utils.get_upload_folder()
    path = gr.processing_utils.save_bytes_to_cache(content, name, cache)
    return gr.update(value=path, interactive=True)


def saved(save, stem, files, facts):
    """{button: update} of the buttons `save`: pictures, {what follows `stem` in the file's name:
    bytes}, and their record."""
    files = {**files, ".json": as_json(facts)}
    return {button: file_to_save(stem + end, content)
            for button, (end, content) in zip(save, files.items(), strict=True)}


def nothing_to_save(save):
    """{button: update} while there is nothing yet."""
    return {button: gr.update(value=None, interactive=False) for button in save}

