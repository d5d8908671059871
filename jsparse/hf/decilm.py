"""DeciLM (Nemotron-NAS): a LLaMA whose config.json tells each layer's FFN width, as other runtimes read it.

    block_configs[l] = {"attention": {"n_heads_in_group": N / K, ...}, "ffn": {"ffn_mult": m, ...}}
    FFN width = int(2 m D / 3), up to the next multiple of 256

Heads are those of the whole model in every layer, and layers that do without attention or FFN are not ours.
"""

from typing import Any

from jsparse.config import ConfigError, LlamaConfig, check

MULTIPLE = 256


def multiplier(width: int, hidden_size: int) -> float:
    """The `ffn_mult` of an FFN width, a multiple of 256."""
    check(width > 0 and width % MULTIPLE == 0, "width", f"a multiple of {MULTIPLE}", width)
    return 1.5 * width / hidden_size


def width(multiplier: float, hidden_size: int) -> int:
    """The FFN width of an `ffn_mult`."""
    return -(-int(2 * multiplier * hidden_size / 3) // MULTIPLE) * MULTIPLE


def holds(config: LlamaConfig) -> bool:
    """Whether the format can express a model's layers."""
    heads = all(s.value_dim == config.head_dim and s.rope_pairs is None for s in config.layer_shapes)
    return heads and all(s.intermediate_size % MULTIPLE == 0 for s in config.layer_shapes) and config.router is None


def write_blocks(config: LlamaConfig) -> dict[str, Any]:
    """The fields of config.json that stand in the place of `intermediate_size` and `num_key_value_heads`."""
    attention = {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads}
    rest = {"no_op": False, "replace_with_linear": False}
    blocks = [{"attention": attention | rest,
               "ffn": {"ffn_mult": multiplier(shape.intermediate_size, config.hidden_size)} | rest}
              for shape in config.layer_shapes]  # fmt: skip
    return {"intermediate_size": None, "num_key_value_heads": None, "block_configs": blocks}


def read_blocks(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json in jsparse's own form.

    Raises:
        ConfigError: a block that jsparse does not compute.
    """
    rest = {name: value for name, value in values.items() if name not in ("architectures", "auto_map")}
    blocks: Any = rest.pop("block_configs", None)
    hidden: Any = rest.get("hidden_size")
    heads: Any = rest.get("num_attention_heads")
    check(isinstance(blocks, list) and len(blocks) > 0, "block_configs", "a list of blocks", blocks)
    check(isinstance(hidden, int) and hidden > 0, "hidden_size", "a size", hidden)
    check(isinstance(heads, int) and heads > 0, "num_attention_heads", "a size", heads)
    widths, groups = [], set()
    for i, block in enumerate(blocks):
        try:
            attention, ffn = block["attention"], block["ffn"]
            for name, part in (("attention", attention), ("ffn", ffn)):
                if part.get("no_op") or part.get("replace_with_linear") or part.get("sparsify"):
                    raise ConfigError(f"block_configs[{i}].{name}: expected one that is there in full, got {part}")
            groups.add(int(attention["n_heads_in_group"]))
            given = ffn.get("intermediate_size") or width(float(ffn["ffn_mult"]), hidden)
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"block_configs[{i}]: expected attention.n_heads_in_group and ffn.ffn_mult, got {block}")\
                from None  # fmt: skip
        widths.append(given)
    alike = len(groups) == 1 and heads % min(groups) == 0
    check(alike, "block_configs", f"one n_heads_in_group, a divisor of {heads} heads", sorted(groups))
    rest |= {"model_type": "jsparse", "intermediate_size": max(widths), "num_key_value_heads": heads // min(groups)}
    if len(set(widths)) > 1:
        head_dim = rest.get("head_dim") or hidden // heads
        rest["layers"] = [{"intermediate_size": w, "value_dim": head_dim} for w in widths]
    return rest
