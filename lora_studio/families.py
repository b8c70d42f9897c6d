"""The table of base-model families: which layers an adapter goes on, and what their well-known models need."""

from dataclasses import dataclass

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A family of base models: transformers' model types, the default target layers, known Hub ids with billions of parameters."""

    name: str
    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    sizes: dict[str, float]
    gated: bool = False


FAMILIES = (
    Family("Demo", (), LLAMA_LINEARS, {"demo-text": 0.002}),
    Family("Qwen3", ("qwen3",), LLAMA_LINEARS,
           {"Qwen/Qwen3-0.6B": 0.6, "Qwen/Qwen3-1.7B": 1.7, "Qwen/Qwen3-4B": 4.0, "Qwen/Qwen3-8B": 8.2}),
    Family("Qwen2", ("qwen2",), LLAMA_LINEARS, {"Qwen/Qwen2.5-0.5B-Instruct": 0.5, "Qwen/Qwen2.5-7B-Instruct": 7.6}),
    Family("Llama 3", ("llama",), LLAMA_LINEARS,
           {"meta-llama/Llama-3.2-1B-Instruct": 1.2, "meta-llama/Llama-3.2-3B-Instruct": 3.2, "meta-llama/Llama-3.1-8B-Instruct": 8.0},
           gated=True),
    Family("SmolLM", ("smollm3",), LLAMA_LINEARS,
           {"HuggingFaceTB/SmolLM2-135M-Instruct": 0.135, "HuggingFaceTB/SmolLM2-360M-Instruct": 0.36,
            "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.7, "HuggingFaceTB/SmolLM3-3B": 3.1}),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text", "gemma3"), LLAMA_LINEARS,
           {"google/gemma-3-270m-it": 0.27, "google/gemma-3-1b-it": 1.0, "google/gemma-2-2b-it": 2.6}, gated=True),
    Family("Mistral", ("mistral", "ministral"), LLAMA_LINEARS,
           {"mistralai/Mistral-7B-Instruct-v0.3": 7.2, "mistralai/Ministral-8B-Instruct-2410": 8.0}, gated=True),
    Family("Phi", ("phi3",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), {"microsoft/Phi-4-mini-instruct": 3.8}),
)  # fmt: skip


def of_model_type(model_type: str) -> Family | None:
    """The family of transformers' model type, if it is in the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def billions(base: str) -> float | None:
    """Billions of parameters of a known Hub id."""
    return next((family.sizes[base] for family in FAMILIES if base in family.sizes), None)


def known_bases() -> list[str]:
    """Every known base, the bundled ones first."""
    return [base for family in FAMILIES for base in family.sizes]
