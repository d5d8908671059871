"""The shapes of models that people know, random weights in them."""

from jsparse.config import Llama3Rope, LlamaConfig

SHAPES = {
    "smollm2-135m": LlamaConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, tie_word_embeddings=True),
    "tinyllama-1.1b": LlamaConfig(32_000, 2048, 5632, 22, 32, 4, 64, 2048),
    "llama2-7b": LlamaConfig(),
    "llama2-13b": LlamaConfig(32_000, 5120, 13_824, 40, 40, 40, 128, 4096),
    "llama3-8b": LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128, 8192, rope=Llama3Rope(8.0, 1.0, 4.0, 8192)),
}
