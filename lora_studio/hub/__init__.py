"""The Hub: who am I, publish a folder, pull a repository. One file for each part:

    names.py    what a repository may be called, and what to call it instead
    scan.py     which files would go, and what in them must not: secrets, local paths, pickles
    client.py   time limits and bounded retries for huggingface_hub, and a sentence for every failure
    remote.py   a repository as the Hub lists it
    push.py     publish: look, upload what is missing, commit, look again, and only then say so
    extras.py   what may come with it: a folder, gating, a tag, a pull request, a collection
    pull.py     pull: one commit, checked file by file, whole or absent
    spaces.py   push the folder of a Space; how a repository stands
    own.py      a private repository of one's own, committed to in one step

The token is a parameter or the Hub's own login. It is never written, logged, or put into an error.
"""

from lora_studio.hub.client import Account, who
from lora_studio.hub.extras import Extras
from lora_studio.hub.names import check_id
from lora_studio.hub.pull import Pulled, pull
from lora_studio.hub.push import Published, publish
from lora_studio.hub.scan import plan, scan
from lora_studio.hub.spaces import Standing, deploy, standing

__all__ = ["Account", "Extras", "Published", "Pulled", "Standing", "check_id", "deploy", "plan", "publish", "pull", "scan", "standing", "who"]
