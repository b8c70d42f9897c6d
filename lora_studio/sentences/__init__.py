"""What every error says: one sentence for each key, which says what, where, and what to do next. The classes are in errors.py."""

from lora_studio.sentences import adapters, host, hub, pictures, runs

SENTENCES = {**runs.SENTENCES, **adapters.SENTENCES, **pictures.SENTENCES, **hub.SENTENCES, **host.SENTENCES}
