"""The page: its tabs, its looks, and the server that shows it without any request to elsewhere."""

import hmac
import html

import gradio as gr

from utils.web.guards import keep_one_copy, refuse_addresses
from utils.web.tabs import canvas_tab, compare_tab, fill_in_tab, look_tab, sample_tab
from utils.web.uploads import MOST_BYTES

WAITING = 32  # visitors whose work waits for its turn; more are asked to come back
SESSIONS = 64  # visitors whose state is kept, a quarter of a megabyte each
CLEANING = (600, 3600)  # seconds between cleanings, and age of the files that are removed
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto;}
.pixels img {image-rendering: pixelated;}
.caption, .caption .html-container {padding: 0 !important; font-size: 14px; opacity: 0.85;}
.figure {gap: 4px !important;}
.another {max-height: 44px; align-self: end;}
.told {min-height: 30px; padding: 6px 12px; border-radius: 8px; font-size: 15px;
       background: var(--background-fill-secondary); display: flex; gap: 14px; align-items: center;}
.told.wrong {background: #fdecea; color: #8a1c13; font-weight: 600;}
.told .bar {flex: 1; height: 8px; border-radius: 4px; overflow: hidden;
            background: var(--border-color-primary);}
.told .bar i {display: block; height: 100%; background: var(--color-accent);}
.told span {font-variant-numeric: tabular-nums;}
#head h1 {margin: 0; font-size: 24px;} #head p {margin: 2px 0 0; opacity: 0.75;}
"""


def facts(studio):
    """What the page shows of the run, in words."""
    H, (height, width) = studio.run.H, studio.shape
    parameters = sum(weight.numel() for weight in studio.network.parameters())
    colour = "grey" if H.n_channels == 1 else "colour"
    return (f"logs/{H.load_dir}, step {H.load_step}: {colour} images of {H.img_size}x{H.img_size} "
            f"pixels from {height}x{width} ids of {H.codebook_size:,} codes; a denoiser of "
            f"{parameters / 1e6:.1f} million parameters, on {studio.run.device}.")


def build_page(studio):
    """The gradio page of a Studio."""
    refuse_addresses()
    keep_one_copy()
    with gr.Blocks(title="Hydra diffusion", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.HTML(f"<h1>Hydra diffusion</h1><p>{html.escape(facts(studio))}</p>", elem_id="head")
        with gr.Tab("Sample"):
            sample_tab(studio)
        if studio.is_absorbing:
            with gr.Tab("Fill in"):
                fill_in_tab(studio)
            with gr.Tab("Canvas"):
                canvas_tab(studio)
        with gr.Tab("Compare"):
            compare_tab(studio)
        with gr.Tab("Look inside"):
            look_tab(studio)
    return page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)


def theme():
    """Looks with the fonts of the visitor's machine: none is fetched."""
    return gr.themes.Default(
        primary_hue="blue", font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )


def serve(page, host, port, password=None):
    """Start the server of a page and return its address; it runs until `page.close()`.

    With a `password` visitors have to type it, with any name.
    """
    def is_allowed(name, typed):
        return hmac.compare_digest(typed.encode(), password.encode())

    _, address, _ = page.launch(
        server_name=host, server_port=port, auth=is_allowed if password else None,
        auth_message="Any name, which must not be empty, and the password." if password else None,
        max_file_size=MOST_BYTES, allowed_paths=[], show_error=False, quiet=True,
        share=False, prevent_thread_lock=True, ssr_mode=False, enable_monitoring=False,
        mcp_server=False, pwa=False, run_history=False, footer_links=[], theme=theme(), css=CSS,
        state_session_capacity=SESSIONS,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return address

