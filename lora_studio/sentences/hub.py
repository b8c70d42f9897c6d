"""What is wrong with the Hub, or between it and us: one sentence for each key."""

SENTENCES = {
    # hub
    "hub.id": "{id} cannot be the name of a repository: {rule}. Try {suggestion}.",
    "hub.no_token": "You are not signed in to the Hub. Sign in with `hf auth login`.",
    "hub.bad_token": "The Hub refused your token while {doing}: it is wrong or has expired. {outcome} "
    "Sign in again with `hf auth login --force` (a token in HF_TOKEN goes before that).",
    "hub.read_token": "The token of {name} may only read. Nothing was published. Make one that may write at "
    "https://huggingface.co/settings/tokens, then sign in with `hf auth login --force`.",
    "hub.namespace": "You cannot publish as {owner}: your token knows {known}. Nothing was published. Publish as {suggestion}, "
    "open a pull request instead, or sign in with a token that may see {owner}.",
    "hub.foreign": "{id} is there already and you may not write to it ({reason}). Nothing was published. Choose another name, or open a pull "
    "request instead.",
    "hub.public": "{id} is there already and is public, and you asked for private. Nothing was published. "
    "Choose another name, such as {suggestion}, or make it private in its settings on the Hub.",
    "hub.missing": "The Hub has no {id}, or your account may not see it. Check the name; sign in with `hf auth login` if it is private.",
    "hub.no_revision": "{id} has no such branch, tag or commit. Check the revision.",
    "hub.gated": "{id} is gated. Open {address}, accept its terms, then sign in with `hf auth login`.",
    "hub.denied": "The Hub does not allow this for {id} ({doing}): {reason}. {outcome} Check what your token may do at "
    "https://huggingface.co/settings/tokens.",
    "hub.refused": "The Hub answered {status} while {doing} for {id}: {reason}. {outcome} If it goes on, "
    "see https://status.huggingface.co.",
    "hub.offline": "The Hub is switched off here (HF_HUB_OFFLINE is set). {outcome} Unset it and try again.",
    "hub.wait": "The Hub asks to wait {wait} while {doing}. {outcome} Try again then.",
    "hub.silent": "The Hub gave no sign while {doing} ({reason}). {outcome} Check the connection and try again.",
    "hub.down": "The Hub failed while {doing} ({status}), several times. {outcome} Try again in a few minutes.",
    "hub.cut": "The connection broke while {doing} ({reason}). {outcome} Check the connection and try again.",
    "hub.proxy": "What answered while {doing} was not the Hub but perhaps a proxy or a sign-in page. {outcome} "
    "Check the connection in a browser, and HF_ENDPOINT if it is set.",
    "hub.card": "The Hub refuses the model card: {reason}. Nothing was published. Correct the lines at the top of README.md.",
    "hub.scan": "Nothing was sent, because of what would have become public: {findings}. Remove it and publish again.",
    "hub.unwanted": "{path} is not published: {reason}. Nothing was sent. Take it out of the folder.",
    "hub.empty": "{path} holds no .safetensors file, so there is nothing to publish. Choose the folder of an adapter.",
    "hub.file": "{path} cannot be used: {reason}. {outcome} Check the file and try again.",
    "hub.moved": "{id} was changed by someone else at the same moment. It is not published yet. Look at it on the Hub, then publish again.",
    "hub.not_whole": "The Hub took the commit, but {files} of {id} is not there as it is here. It is not published yet. Publish again; "
    "only what is missing is sent. See whether a .gitignore there leaves it out.",
    "hub.unknown": "The last answer of the Hub did not arrive, and {id} cannot be looked at ({reason}) "
    "It may be published or not. Publish again when the Hub answers: it looks first and sends only what is missing.",
    "hub.tag_name": "{name} cannot be the name of a version. Nothing was sent. Use letters, digits, and - _ . between them, such as v1.0.",
    "hub.folder_name": "{name} cannot be the folder of an adapter. Nothing was sent. Use letters, digits, and - _ . between them, such as pirate.",
    "hub.gate_name": "{name} does not say who may have it. Nothing was sent. Choose one of {known}.",
    "hub.collection_name": "{name} cannot be the title of a collection. Nothing was sent. Use one line of at most {longest} characters.",
    "hub.request_only": "A pull request only asks for its files to be taken; {what} is for whoever owns the repository. Nothing was sent. "
    "Leave it out, or publish without a pull request.",
    "hub.not_gated": "{id} should be gated ({wish}), and the Hub says {found}. Nothing was sent. Set it in the settings of {id}, then publish again.",
    "hub.tag": "{id} has the version {tag} already, and it holds other files. Nothing was sent. Choose another, such as {suggestion}.",
    "hub.tag_moved": "The files are published, but {tag} of {id} stands for others: somebody set it meanwhile. Choose another version, such as "
    "{suggestion}, and publish again.",
    "hub.no_collection": "There is no collection {slug}, or your account may not see it. {outcome} Check its name, or give a title for a new one.",
    "hub.not_collected": "{id} is published, but the Hub does not list it in the collection {slug}. Publish again, or add it there on the Hub.",
    "demo.base": "A demo Space finds its base on the Hub, and {base} is on this machine only. Publish the base and train on that, or show the adapter in the Playground.",
    "demo.edits": "{family} makes a picture of a picture, and the demo page asks for words only. Show the adapter in the Playground.",
    "demo.private": "{id} is private, so its demo Space is too: it would show to all what only you may see. Leave the Space private, or publish the adapter for all first.",
    "demo.other": "{id} is a Space already, and no demo of an adapter. It was left as it is. Choose another name, such as {suggestion}.",
    "hub.target": "{path} is there already. Nothing was pulled. Choose another name.",
    "hub.bad_name": "{id} holds a file with the name {name}, which no adapter needs. Nothing was pulled. Do not use this repository.",
    "hub.pickle": "{id} has its weights in {name}, which may be a pickle, and pickles run code. Nothing was pulled. "
    "Ask its author for a .safetensors file.",
    "hub.no_weights": "{id} holds no .safetensors file ({known}). Nothing was pulled. Check the name and the subfolder.",
    "hub.damaged": "{file} of {id} arrived with other bytes than the Hub lists ({size} bytes of {expected}). Nothing was pulled. "
    "Pull again; a proxy on the way may have changed it.",
}
