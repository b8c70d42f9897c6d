"""The Hub: who am I, publish a folder, pull a repository. One file for each part:

    names.py    what a repository may be called, and what to call it instead
    scan.py     which files would go, and what in them must not: secrets, local paths, pickles
    client.py   time limits and bounded retries for huggingface_hub, and a sentence for every failure
    push.py     publish: look, upload what is missing, commit, look again, and only then say so
    pull.py     pull: one commit, checked file by file, whole or absent

The token is a parameter or the Hub's own login. It is never written, logged, or put into an error.
"""

from lora_studio.hub.client import Account, who
from lora_studio.hub.names import check_id
from lora_studio.hub.pull import Pulled, pull
from lora_studio.hub.push import Published, publish
from lora_studio.hub.scan import plan, scan

__all__ = ["Account", "Published", "Pulled", "check_id", "plan", "publish", "pull", "scan", "who"]
