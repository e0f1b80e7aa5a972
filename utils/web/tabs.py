"""The tabs of the page: each lays out its components and says what its buttons do."""

from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.logging.images import to_pil
from utils.web import pictures
from utils.web.guards import MaskEditor
from utils.web.parts import (
    TURN, WAITING, Choices, buttons, caption, cost, counted, done, file_to_save, nothing_to_save,
    picture, running, save_buttons, saved, seed_row, starts, status_line, telling,
)
from utils.web.records import as_json, as_png, as_zip
from utils.web.stepwise import Step
from utils.web.studio import (
    MOST_CANVASES, MOST_COMPARED, MOST_COMPLETIONS, MOST_SAMPLES, MOST_TIMES, Choice,
)
from utils.web.uploads import CANVAS, MOST_BYTES, painted, read_layers, to_paint_on

PAINT = "#ff2d55"
FIRST = 3  # the number of the image of the dataset that is shown at first
PICTURE, IDS = "Save the picture (PNG)", "Save the ids (PNG)"
CANVAS_STEPS = 64  # of a canvas at first, where the run has more


def grid_of(images):
    """Images uint8 [n, C, H, W] as experiments save them, a PIL image."""
    return to_pil(pictures.image_grid(images))


def sheet_of_ids(studio, ids, size, shape=None):
    """Ids [n, N] as a PIL image of coloured grids, laid out as images of `size` are."""
    images = pictures.ids_as_images(ids, tuple(shape or studio.shape), studio.colours, size)
    return pictures.sheet(images)


def drawn_saved(save, name, drawn, ids):
    """{button: update} of the buttons that save Drawn images, a PIL image of their ids and their
    record."""
    files = {".png": as_png(grid_of(drawn.images)), "_ids.png": as_png(ids)}
    return saved(save, f"{name}_seed{drawn.record['samples']['seed']}", files, drawn.record)


# --- sample


def sample_tab(studio):
    """Draw samples, and watch their ids appear."""
    H = studio.run.H
    size = (H.img_size, H.img_size)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            choices = Choices(studio, H.n_samples, MOST_SAMPLES)
            draw, stop = buttons("Draw")
        with gr.Column(scale=5):
            status = status_line("Press Draw: the ids appear step by step while the images form.")
            with gr.Row():
                ids = picture("The ids, a colour each; grey is not drawn yet")
                images = picture("The images that they decode to")
            save = save_buttons(PICTURE, IDS)

    @telling(status, studio.run.log)
    def handler(*values):
        yield {status: WAITING, **nothing_to_save(save)}
        for item in studio.sample(Choice(*values)):
            shown = {ids: sheet_of_ids(studio, item.ids, size)}
            if isinstance(item, Step):
                yield {**shown, images: pictures.sheet(studio.partial(item.ids)),
                       status: running(item)}
            else:
                yield {**shown, images: pictures.sheet(item.images),
                       status: done(cost(item, counted(len(item.images), "image"))),
                       **drawn_saved(save, "samples", item, shown[ids])}

    starts(draw, stop, handler, choices.inputs, [status, ids, images, *save], status)


# --- images that are given


class Given:
    """Components by which a visitor names an image: its number in the dataset, or a file."""

    def __init__(self, studio):
        self.studio, self.number = studio, gr.Number(
            FIRST, label="Image of the dataset, by its number",
            info=f"0 to {len(studio.dataset) - 1:,}" if studio.dataset else studio.no_dataset,
            interactive=studio.dataset is not None,
        )
        self.file = gr.File(label=f"or a file of your own, up to {MOST_BYTES // 10**6} MB",
                            height=140, type="filepath")

    @property
    def inputs(self):
        return [self.number, self.file]

    def load(self, number, path):
        """(PIL image, flags of experiments/inpaint.py that name it)."""
        image = self.studio.photograph(path, number)
        return image, {"image": Path(path).name} if path else {"image_index": int(number)}


def fill_in_tab(studio):
    """Paint over a part of an image, and let the model fill it in."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            given = Given(studio)
            choices = Choices(studio, 8, MOST_COMPLETIONS)
            fill, stop = buttons("Fill in")
        with gr.Column(scale=5):
            status = status_line("Paint over what is to be filled in, then press Fill in.")
            with gr.Row():
                with gr.Column(min_width=300, elem_classes="figure"):
                    caption("The image: paint over what is to be filled in")
                    editor = MaskEditor(
                        first_to_paint(given), show_label=False, type="pil", format="png",
                        sources=(), transforms=(), layers=False, canvas_size=(CANVAS, CANVAS),
                        height=520, elem_id="mask",
                        brush=gr.Brush(default_size=48, colors=[PAINT], color_mode="fixed"),
                        eraser=gr.Eraser(default_size=48), elem_classes="pixels",
                    )
                with gr.Column(min_width=300, elem_classes="figure"):
                    caption("Completions, at the image's own size")
                    gallery = gr.Gallery(
                        show_label=False, columns=3, height=520, format="png", interactive=False,
                        object_fit="contain", buttons=["download", "fullscreen"],
                        elem_classes="pixels",
                    )
            save = save_buttons("Save the completions and the mask (ZIP)")

    show = image_shower(given, editor, status)
    for event in (given.number.change, given.file.upload, given.file.clear):
        event(show, given.inputs, [editor, status], show_progress="hidden",
              api_visibility="private", **TURN)

    @telling(status, studio.run.log)
    def handler(layers, number, path, *values):
        yield {status: WAITING, **nothing_to_save(save)}
        image, source = given.load(number, path)
        mask = painted(read_layers(layers or []), to_paint_on(image).size)
        for item in studio.fill_in(Choice(*values), image, mask, source):
            if isinstance(item, Step):
                forming = [to_pil(part) for part in studio.partial(item.ids)]
                yield {gallery: [pictures.enlarged(part, 256) for part in forming],
                       status: running(item)}
            else:
                count = counted(len(item.images), "completion")
                words = f"{count} of {image.width}x{image.height} pixels"
                yield {**completions_saved(item, mask, gallery, save),
                       status: done(f"{cost(item, words)}; what is kept is untouched")}

    inputs = [editor, *given.inputs, *choices.inputs]
    starts(fill, stop, handler, inputs, [status, gallery, *save], status)


def to_paint(image):
    """The value of the editor that shows a PIL image, with nothing painted."""
    background = to_paint_on(image)
    return {"background": background, "layers": [], "composite": background}


def first_to_paint(given):
    """What the editor shows at first: an image of the dataset, where there is one."""
    try:
        return to_paint(given.load(FIRST, None)[0])
    except UserError:
        return None


def image_shower(given, editor, status):
    """A handler that shows the image that is given in the `editor`, to be painted on."""
    @telling(status, given.studio.run.log, editor)
    def show(number, path):
        image, _ = given.load(number, path)
        sentence = f"An image of {image.width}x{image.height} pixels: paint over what is to be " \
                   f"filled in, then press Fill in."
        if image.width != image.height:
            sentence += " The model sees its central square; what is faded stays as it is."
        yield {editor: to_paint(image), status: done(sentence)}

    return show


def completions_saved(drawn, mask, gallery, save):
    """{component: update} of Drawn completions: the gallery, and the buttons that save them."""
    files = {f"completion_{number}.png": as_png(image) for number, image in enumerate(drawn.images)}
    paths = [file_to_save(name, content)["value"] for name, content in files.items()]
    archive = as_zip({
        **files, "mask.png": as_png(Image.fromarray(mask.astype(np.uint8) * 255)),
        "record.json": as_json(drawn.record),
    })
    return {gallery: paths, **saved(save, "completions", {".zip": archive}, drawn.record)}


# --- canvas


def canvas_tab(studio):
    """Draw images larger than those trained on."""
    H, (height, width) = studio.run.H, studio.shape
    patch = H.img_size // height
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            sides = [
                gr.Slider(least, MOST_TIMES * least, value=2 * least, step=1,
                          label=f"{name} in ids", info=f"{patch} pixels each; trained on {least}")
                for name, least in (("Height", height), ("Width", width))
            ]
            modes = [("windows of the size trained on", "windows")]
            modes += [("native: the whole canvas at once", "native")] if studio.is_native else []
            mode = gr.Radio(
                modes, value=modes[-1][1], label="How", info=None if studio.is_native else
                "The whole canvas at once needs a model without absolute positions",
            )
            choices = Choices(studio, 1, MOST_CANVASES, steps=min(H.sample_steps, CANVAS_STEPS))
            draw, stop = buttons("Draw")
        with gr.Column(scale=5):
            status = status_line("A canvas takes longer than a sample: it has more ids.")
            with gr.Row():
                ids = picture("The ids, a colour each; grey is not drawn yet")
                images = picture("The canvas")
            save = save_buttons(PICTURE, IDS)

    @telling(status, studio.run.log)
    def handler(height, width, mode, *values):
        yield {status: WAITING, images: None, **nothing_to_save(save)}
        for item in studio.canvas(Choice(*values), height, width, mode):
            size = (int(height) * patch, int(width) * patch)
            shown = {ids: sheet_of_ids(studio, item.ids, size, (int(height), int(width)))}
            if isinstance(item, Step):
                yield {**shown, status: running(item, "steps")}
            else:
                canvases = "1 canvas" if len(item.images) == 1 else f"{len(item.images)} canvases"
                words = f"{canvases} of {size[1]}x{size[0]} pixels"
                yield {**shown, images: pictures.sheet(item.images),
                       status: done(cost(item, words)),
                       **drawn_saved(save, "canvas", item, shown[ids])}

    outputs = [status, ids, images, *save]
    starts(draw, stop, handler, [*sides, mode, *choices.inputs], outputs, status)


# --- compare


def compare_tab(studio):
    """Two ways of sampling side by side, on one seed."""
    H, sides = studio.run.H, []
    with gr.Row():
        with gr.Column(scale=2, min_width=200):
            count = gr.Slider(1, MOST_COMPARED, value=min(9, H.n_samples), step=1,
                              label="How many images")
        with gr.Column(scale=2, min_width=200):
            seed = seed_row(H.seed)
        with gr.Column(scale=1, min_width=200):
            compare, stop = buttons("Compare")
    told = status_line("Both sides draw with the same seed, one after the other.")
    with gr.Row():
        for name, temp in (("A", H.temp), ("B", 1.0 if H.temp != 1 else 0.7)):
            with gr.Column():
                caption(f"{name}: how it draws")
                choices = Choices(studio)
                choices.temp.value = temp
                sides.append((choices, status_line(f"{name} is not drawn yet."),
                              picture(f"{name}, the images")))
    save = save_buttons(PICTURE)
    outputs = [told, *save, *(part for side in sides for part in side[1:])]

    @telling(told, studio.run.log)
    def handler(count, seed, *values):
        yield {told: WAITING, **nothing_to_save(save),
               **{part: value for _, status, image in sides
                  for part, value in ((status, done("…")), (image, None))}}
        first, second = (Choice(count, *part, seed) for part in (values[:3], values[3:]))
        drawn = []
        for side, item in studio.compare(first, second):
            _, status, image = sides[side]
            if isinstance(item, Step):
                yield {status: running(item), image: pictures.sheet(studio.partial(item.ids))}
            else:
                drawn.append(item)
                yield {status: done(cost(item, counted(len(item.images), "image"))),
                       image: pictures.sheet(item.images)}
        yield {told: done(comparison(*drawn)), **saved(
            save, "comparison",
            {".png": as_png(beside(*(grid_of(item.images) for item in drawn)))},
            {"A": drawn[0].record, "B": drawn[1].record})}

    inputs = [count, seed, *(part for choices, *_ in sides
                             for part in (choices.method, choices.steps, choices.temp))]
    starts(compare, stop, handler, inputs, outputs, told)


def comparison(first, second):
    """How long both sides took, in words."""
    slower, faster = sorted((first.seconds, second.seconds), reverse=True)
    name, times = "A" if first.seconds < second.seconds else "B", slower / max(faster, 1e-9)
    found = "they are equally fast" if times < 1.05 else f"{name} is {times:.1f} times as fast"
    return f"A took {first.seconds:.2f} s, B {second.seconds:.2f} s: {found}."


def beside(left, right, gap=24):
    """Two PIL images side by side."""
    height = max(left.height, right.height)
    both = Image.new("RGB", (left.width + gap + right.width, height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both


# --- look inside

SOURCES = ("an image of the dataset or a file", "a sample")


def look_tab(studio):
    """An image, its reconstruction, its ids, the codes in use, the nearest training images."""
    H = studio.run.H
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            source = gr.Radio(SOURCES, value=SOURCES[0], label="Look inside")
            with gr.Column() as of_image:
                given = Given(studio)
            with gr.Column(visible=False) as of_sample:
                seed = seed_row(H.seed)
            look, stop = buttons("Look")
        with gr.Column(scale=5):
            status = status_line("Press Look.")
            with gr.Row():
                shown = [picture("The image"), picture("Its reconstruction"),
                         picture("Its ids", crisp=False)]
    codes = picture("Codes in use, the most frequent first: colour, mean of the pixels that it "
                    "stands for here, how often", crisp=False)
    nearest = picture("Nearest training images, with their distance and their number in the "
                      "dataset", crisp=False)
    save = save_buttons("Save the pictures (ZIP)")
    source.change(lambda name: [gr.update(visible=name == one) for one in SOURCES], source,
                  [of_image, of_sample], queue=False, api_visibility="private")

    @telling(status, studio.run.log)
    def handler(name, seed, number, path):
        yield {status: WAITING, **nothing_to_save(save)}
        if name == SOURCES[1]:
            items = studio.look_at_sample(Choice(1, H.sample_type, H.sample_steps, H.temp, seed))
        else:
            image, flags = given.load(number, path)
            items = studio.look(image, flags)
        for item in items:
            if isinstance(item, Step):
                yield {status: running(item, "steps")}
            else:
                yield view_shown(studio, *item, [status, *shown, codes, nearest], save)

    outputs = [status, *shown, codes, nearest, *save]
    starts(look, stop, handler, [source, seed, *given.inputs], outputs, status)


def view_shown(studio, view, facts, parts, save):
    """{component: update} of a View: in words, as pictures, and the buttons that save it."""
    status, image, reconstruction, ids, codes, nearest = parts
    psnr, largest = pictures.difference(view.image, view.reconstruction)
    sentence = (f"{len(view.ids)} ids use {len(view.patches)} of {studio.blank:,} codes; the PSNR "
                f"of the reconstruction is {psnr:.1f} dB, its largest error {largest} of 255")
    labels = [f"{distance:.2f} · no. {number}"
              for distance, number in zip(view.distances, view.numbers)]
    shown = {
        image: pictures.enlarged(to_pil(view.image)),
        reconstruction: pictures.enlarged(to_pil(view.reconstruction)),
        ids: pictures.numbered(view.ids, studio.shape, studio.colours),
        codes: pictures.codes_in_use(view.ids, studio.colours, view.patches),
        nearest: pictures.labelled_row(torch.cat((view.image[None], view.neighbours)),
                                       ["the image", *labels]),
    }
    names = ("image", "reconstruction", "ids", "codes_in_use", "nearest")
    archive = as_zip({**{f"{name}.png": as_png(shown[part])
                         for name, part in zip(names, parts[1:], strict=True)},
                      "record.json": as_json(facts)})
    return {status: done(sentence), **shown, **saved(save, "inside", {".zip": archive}, facts)}
