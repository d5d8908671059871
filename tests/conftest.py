"""Eight fake CPU devices, strict promotion: set before anything touches jax."""

import gc
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# The tests' time is compilation, not arithmetic: without LLVM's optimizations, and by XLA's older code generator, which
# takes a quarter of the time, in one piece; from JAX 0.11 on there is the newer one only, which makes a piece a kernel.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):
    older = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {older}"
# What jax keeps of every program makes a collection of garbage slow, and little of it is garbage.
gc.set_threshold(100_000)

# transformers imports remote code from one folder a process, whose name it reads once.
MODULES = tempfile.TemporaryDirectory(prefix="jsparse-tests-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
