"""Pictures: files and archives to decoded, captioned, bucketed pictures for training, and those that were drawn. Loads no torch.

    sources.py    where pictures come from: folders, metadata files, kohya's folders
    archives.py   a .zip, unpacked once and harmlessly
    hub_sets.py   a Hub data set, written out as files
    staging.py    folders in the cache that are whole or not there
    labels.py     which caption and mask belong to which picture
    decoding.py   bytes to pixels: every format looks alike afterwards
    captions.py   a caption as it is shown to the model
    buckets.py    which size a picture is trained in
    album.py      a folder of pictures that the studio keeps: edits.py, history.py, intake.py
    statistics.py thumbnails.py    what there is to know and to see of them
    clips.py      films as rows
    samples.py    pictures that were drawn, as files
    grid.py       many of them as one
"""

from lora_studio.pictures.buckets import bucket, edges
from lora_studio.pictures.captions import caption
from lora_studio.pictures.clips import length
from lora_studio.pictures.decoding import load, load_frames, load_mask
from lora_studio.pictures.grid import Block, compose
from lora_studio.pictures.picture import Picture, Pictures, fingerprint
from lora_studio.pictures.sources import collect, locate

__all__ = ["Block", "Picture", "Pictures", "bucket", "caption", "collect", "compose", "edges", "fingerprint", "length", "load", "load_frames", "load_mask", "locate"]
