"""Pictures for training: files and archives to decoded, captioned, bucketed pictures. Loads no torch.

    sources.py    where pictures come from: folders, metadata files, kohya's folders
    archives.py   a .zip, unpacked once and harmlessly
    hub_sets.py   a Hub data set, written out as files
    staging.py    folders in the cache that are whole or not there
    labels.py     which caption and mask belong to which picture
    decoding.py   bytes to pixels: every format looks alike afterwards
    captions.py   a caption as it is shown to the model
    buckets.py    which size a picture is trained in
"""

from lora_studio.pictures.buckets import bucket
from lora_studio.pictures.captions import caption
from lora_studio.pictures.decoding import load, load_mask
from lora_studio.pictures.picture import Picture, Pictures, fingerprint
from lora_studio.pictures.sources import collect, locate

__all__ = ["Picture", "Pictures", "bucket", "caption", "collect", "fingerprint", "load", "load_mask", "locate"]
