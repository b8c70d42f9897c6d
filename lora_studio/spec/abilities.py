"""What each way of training an adapter can do here, as a table: METHODS by ABILITIES, and a sentence for every cell that is not so.

Every cell without a sentence is run by tests/training/test_matrix.py and tests/training/test_methods.py; the README's table is made of it.
"""

ABILITIES = ("text", "image", "4-bit base", "resume", "Playground", "blend", "bake", "parallel")

# (name, the settings that make it)
METHODS = {
    "LoRA": {"method": {"rank": 4, "alpha": 8}},
    "LoRA+": {"method": {"rank": 4, "alpha": 8}, "optim": {"lr": 1e-3, "lora_plus_ratio": 8}},
    "rsLoRA": {"method": {"rank": 4, "alpha": 8, "rslora": True}},
    "DoRA": {"method": {"rank": 4, "alpha": 8, "dora": True}},
    "LoRA-FA": {"method": {"rank": 4, "alpha": 8, "freeze_a": True}},
    "LoRA on experts": {"method": {"rank": 4, "alpha": 8, "experts": True}},
    "orthogonal start": {"method": {"rank": 4, "alpha": 8, "init": "orthogonal"}},
    "PiSSA": {"method": {"rank": 4, "alpha": 8, "init": "pissa"}},
    "OLoRA": {"method": {"rank": 4, "alpha": 8, "init": "olora"}},
    "EVA": {"method": {"rank": 4, "alpha": 8, "init": "eva"}},
    "CorDA": {"method": {"rank": 4, "alpha": 8, "init": "corda"}},
    "LoRA-GA": {"method": {"rank": 4, "alpha": 8, "init": "lora_ga"}},
    "LoftQ": {"method": {"rank": 4, "alpha": 8, "init": "loftq"}, "compute": {"quantize": "4bit"}},
    "DyLoRA": {"method": {"kind": "dylora", "rank": 4, "alpha": 8}},
    "AdaLoRA": {"method": {"kind": "adalora", "rank": 2, "first_rank": 4, "alpha": 8, "every": 2}},
    "VeRA": {"method": {"kind": "vera", "rank": 16}},
    "LoHa": {"method": {"kind": "loha", "rank": 3, "alpha": 6}},
    "LoKr": {"method": {"kind": "lokr", "rank": 3, "alpha": 6}},
    "MiSS": {"method": {"kind": "miss", "rank": 4}},
    "OFT": {"method": {"kind": "oft", "block": 8}},
    "IA3": {"method": {"kind": "ia3"}},
    "prompt tuning": {"method": {"kind": "prompt", "tokens": 5}},
    "prefix tuning": {"method": {"kind": "prefix", "tokens": 5}},
    "full fine-tuning": {"method": {"kind": "full", "save": "lora", "rank": 32}},
}

_FOUR = "it needs the base's own numbers"
_SHAPES = "its products do not fit packed weights"
_TIMES = "it multiplies the weights"
_BEFORE = "its virtual tokens change no weight"
_NO_LOADER = "no loader of image models knows it"
_NO_EXPERTS = "image models have no experts"
_ONE = "a run carries one such adapter"
CROSSES = {
    ("LoRA on experts", "image"): _NO_EXPERTS,
    ("LoRA on experts", "4-bit base"): "bitsandbytes packs no experts, which are most of a mixture",
    ("DoRA", "blend"): "its lengths are no sum of low-rank updates",
    ("orthogonal start", "4-bit base"): _FOUR,
    ("PiSSA", "4-bit base"): _FOUR,
    ("OLoRA", "4-bit base"): _FOUR,
    ("CorDA", "4-bit base"): _FOUR,
    ("LoRA-GA", "4-bit base"): _FOUR,
    ("LoftQ", "image"): "it is tried on language models only",
    ("full fine-tuning", "4-bit base"): _FOUR,
    ("full fine-tuning", "parallel"): "the base itself changes",
    **{(name, what): _TIMES for name in ("OFT", "IA3") for what in ("blend",)},
    **{(name, what): _BEFORE for name in ("prompt tuning", "prefix tuning") for what in ("blend", "bake")},
    **{(name, "image"): _NO_LOADER for name in ("OFT", "IA3", "prompt tuning", "prefix tuning")},
    ("IA3", "4-bit base"): "PEFT's layer for it answers in fp32 there",
    ("LoHa", "4-bit base"): _SHAPES,
    ("LoKr", "4-bit base"): _SHAPES,
    **{(name, "parallel"): _ONE for name in ("LoRA on experts", "DoRA", "PiSSA", "OLoRA", "EVA", "CorDA", "LoRA-GA", "LoftQ", "DyLoRA", "AdaLoRA", "VeRA", "LoHa", "LoKr", "MiSS", "OFT", "IA3", "prompt tuning", "prefix tuning")},
}


def table() -> str:
    """The table in Markdown."""
    lines = ["| method | " + " | ".join(ABILITIES) + " |", "| --- |" + " --- |" * len(ABILITIES)]
    for name in METHODS:
        lines.append(f"| {name} | " + " | ".join("no: " + CROSSES[name, what] if (name, what) in CROSSES else "yes" for what in ABILITIES) + " |")
    return "\n".join(lines)
