"""The tokenizer inside a GGUF file as Hugging Face's tokenizer.json and tokenizer_config.json."""

import json
from typing import Any

from jsparse.config import ConfigError

# How text is cut before merging: tokenizer.ggml.pre, and llama.cpp's definition of it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("gpt-2", "gpt2", "olmo", "phi-2")
_DIGITS = ("smollm", "starcoder", "refact", "codeshell")
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def files(fields: dict[str, Any], where: str) -> dict[str, str]:
    """File names and contents; none where the file holds no tokenizer.

    Raises:
        ConfigError: a kind of tokenizer that is not known exactly.
    """
    get: Any = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}.get
    kind, pre = get("model"), get("pre")
    if kind is None:
        return {}
    if kind == "llama":
        tokenizer = _sentencepiece(
            get("tokens"), get("scores"), get("unknown_token_id", 0), get("add_space_prefix", True)
        )
    elif kind == "gpt2" and pre in (*_GPT2, *_DIGITS, *_LLAMA_3):
        tokenizer = _byte_level(get("tokens"), get("merges"), pre)
    else:
        raise ConfigError(f"{where}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
                          "give the model's own tokenizer folder instead")  # fmt: skip
    tokens = get("tokens")
    ids = {"bos": get("bos_token_id"), "eos": get("eos_token_id"), "unk": get("unknown_token_id"),
           "pad": get("padding_token_id")}  # fmt: skip
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    _mark(tokenizer, tokens, get("token_type") or [], set(special.values()))
    if get("add_bos_token", kind == "llama" or pre in _LLAMA_3) and ids["bos"] is not None:
        _prepend(tokenizer, special["bos_token"], ids["bos"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    made = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    template = fields.get("tokenizer.chat_template")
    return made | ({"chat_template.jinja": template} if template else {})


def _byte_level(tokens: list[str], merges: list[str], pre: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _LLAMA_3))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _LLAMA_3)]
    if pre in _DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre in _LLAMA_3:
        steps.insert(0, pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], unknown: int, prefix: bool) -> Any:
    """SentencePiece's BPE: of all pairs that make a token, the one of the best score merges first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for i, token in enumerate(tokens):
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        made = [(vocab[a], vocab[b]) for a, b in cuts if a in vocab and b in vocab]
        pairs += [(-scores[i], i, a, b) for a, b in sorted(made)]
    merges = [(tokens[a], tokens[b]) for _, _, a, b in sorted(pairs)]
    bpe = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=tokens[unknown])
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _mark(tokenizer: Any, tokens: list[str], types: list[int], special: set[str]) -> None:
    """Tokens that text is searched for before anything else."""
    from tokenizers import AddedToken

    for token, kind in zip(tokens, types, strict=False):
        if kind == _CONTROL or token in special:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _prepend(tokenizer: Any, token: str, i: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, i)]
    )
