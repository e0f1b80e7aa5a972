"""What the server takes from visitors beyond files, and what it keeps of them, within limits.

gradio itself would decode whatever is sent in place of a painting, keep all that was ever sent,
fetch any public address that is named in place of a file, and keep a further copy of a component
each time it is updated and then shown.
"""

import abc
from pathlib import Path

import gradio as gr
from fastapi import HTTPException
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs

from utils.web.uploads import MOST_BLOB, MOST_LAYERS

MOST_PAINTINGS = 32  # that are kept until their visitors press the button; the oldest goes


class _Quiet(type(gr.ImageEditor)):
    """Makes a class of components without the .pyi file that gradio writes beside its source."""

    def __new__(cls, name, bases, attributes):
        return abc.ABCMeta.__new__(cls, name, bases, attributes)


class MaskEditor(gr.ImageEditor, metaclass=_Quiet):
    """An editor whose value is what is painted, still as files: a list of paths or of bytes, for
    `utils.web.uploads.read_layers`. Background and composite are not kept."""

    is_template = True  # the browser shows it as an ImageEditor

    def preprocess(self, payload):
        if payload is None:
            return []
        if payload.id is not None:
            payload = self.blob_storage.pop(payload.id, None)
        layers = payload.layers if payload else []
        return [layer if isinstance(layer, bytes) else Path(layer.path)
                for layer in layers if layer is not None]

    @server
    def accept_blobs(self, data: AcceptBlobs):
        """Keep a layer that the browser sends before its event."""
        if data.data["type"] != "layer":
            return
        place = str(data.data["index"])
        if not place.isdecimal() or len(place) > 2 or int(place) >= MOST_LAYERS or not data.files:
            raise HTTPException(400, f"a painting has {MOST_LAYERS} layers at most")
        if len(data.files[0][1]) > MOST_BLOB:
            raise HTTPException(413, "this layer is larger than what can be painted")
        super().accept_blobs(data)
        for name in list(self.blob_storage)[:-MOST_PAINTINGS]:
            self.blob_storage.pop(name, None)


class OneCopy(gr.state_holder.SessionState):
    """A visitor's state that holds each component once.

    gradio replaces a component that is updated by a copy with an id of its own, under which it
    enters the copy a second time when it next has a value.
    """

    def __setitem__(self, key, value):
        if isinstance(value, gr.blocks.Block):
            value._id = key
        super().__setitem__(key, value)


def keep_one_copy():
    """Let the state of every visitor be a OneCopy, in this process."""
    gr.state_holder.SessionState = OneCopy


async def refuse(address, *arguments, **options):
    """In place of gradio's functions that fetch an address which a visitor has named."""
    raise gr.Error("Addresses are not fetched: give a file.", print_exception=False)


def refuse_addresses():
    """Let gradio fetch nothing in this process, for any component."""
    for name in ("async_ssrf_protected_get", "async_ssrf_protected_download"):
        if not hasattr(gr.processing_utils, name):
            raise RuntimeError(f"this gradio has no {name}: it cannot be kept from fetching")
        setattr(gr.processing_utils, name, refuse)
