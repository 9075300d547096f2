"""Pictures and tars that tests write for themselves."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed=0, format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=format)
    return out.getvalue()


def write_tar(path, samples):
    """samples: name -> {extension: content}."""
    with tarfile.open(path, "w") as tar:
        for name, fields in samples.items():
            for extension, content in fields.items():
                data = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pair(i):
    return {"png": picture(i), "txt": f"caption {i}"}
