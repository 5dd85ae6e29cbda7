"""A disk that goes bad: bits of the experts in a checkpoint's files are flipped, and flipped back."""

import json
from pathlib import Path

EVERY_BYTES = 1024
"""One bit in each stretch of this size, so that no expert is spared."""
BIT = 0x40


def flip_experts(folder: Path) -> int:
    """Flip bits of all experts in the safetensors files of `folder`; again: they are right again.

    Whoever has the files open sees it at once. Returns how many bits.
    """
    num_flipped = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("r+b") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            file.seek(8)
            header = json.loads(file.read(begin - 8))
            for name, tensor in header.items():
                if ".experts." not in name:
                    continue
                first, end = tensor["data_offsets"]
                for place in range(begin + first, begin + end, EVERY_BYTES):
                    file.seek(place)
                    byte = file.read(1)[0]
                    file.seek(place)
                    file.write(bytes([byte ^ BIT]))
                    num_flipped += 1
    return num_flipped
