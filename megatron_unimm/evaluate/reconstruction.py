"""A tokenizer's pictures beside the true ones, and what its streams still tell apart.

Without files: Shapes scenes that no training made, and for the linear probe pictures of one object anywhere, whose
colour and shape together are the class. With a folder: its images, and where they are in folders of their own, these
are the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import decode
from megatron_unimm.data.shapes import COLOURS, SHAPES, render_array, sample_free_scene
from megatron_unimm.errors import DataError
from megatron_unimm.evaluate.picture_metrics import frechet_distance, probe_accuracy, psnr, ssim
from megatron_unimm.evaluate.suite import Suite, SuiteResult
from megatron_unimm.generate.picture_tokenizer import PictureTokenizer

SEED = 2**31
"""Of scenes; data of training begins at seeds of its own."""
MAX_IMAGE_PIXELS = 1 << 26
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
PROBE_PER_PICTURE = 4
"""Pictures for the probe, made for each one that is drawn again."""
TEST_SHARE = 4
"""One in so many is asked for, the others are learned from."""
SHOWN = 12


@dataclass(frozen=True)
class ReconstructionItems:
    """uint8 (H, W, 3) each."""

    pictures: Sequence[np.ndarray]
    """To be drawn again."""
    classified: Sequence[np.ndarray]
    """For the probe; none without classes."""
    labels: Sequence[int]


def load_items(data: Path | None, count: int) -> ReconstructionItems:
    """``count`` pictures.

    Raises:
        DataError: no image in the folder.
    """
    if data is not None:
        return _from_folder(data, count)
    scenes = [sample_free_scene(np.random.default_rng([SEED, number])) for number in range(count)]
    single = [
        sample_free_scene(np.random.default_rng([SEED, number, 1]), 1) for number in range(count * PROBE_PER_PICTURE)
    ]
    colours: list[str] = list(COLOURS)
    shapes: list[str] = list(SHAPES)
    labels = [colours.index(s.objects[0].colour) * len(shapes) + shapes.index(s.objects[0].shape) for s in single]
    return ReconstructionItems([render_array(s) for s in scenes], [render_array(s) for s in single], labels)


def _from_folder(data: Path, count: int) -> ReconstructionItems:
    classes = sorted(folder for folder in data.iterdir() if folder.is_dir()) if data.is_dir() else []
    by_class = [_images(folder) for folder in classes] or [_images(data)]
    if not any(by_class):
        raise DataError(str(data), f"has no image ({', '.join(ENDINGS)}), nor folders of them; give another")
    # In turn, so that as many of each class are learned from and asked for.
    longest = max(map(len, by_class))
    turns = [(label, place) for place in range(longest) for label, files in enumerate(by_class) if place < len(files)]
    read = [(decode(DiskImage(by_class[label][place]), MAX_IMAGE_PIXELS), label) for label, place in turns[:count]]
    pictures = [picture for picture, _ in read]
    if not classes:
        return ReconstructionItems(pictures, [], [])
    return ReconstructionItems(pictures, pictures, [label for _, label in read])


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS) if folder.is_dir() else []


def run(tokenizer: PictureTokenizer, items: ReconstructionItems) -> SuiteResult:
    """PSNR (the main figure), SSIM, Fréchet distance over the original encoder's features, and the probes."""
    looked = tokenizer.look(items.pictures)
    pairs = list(zip(looked.true, looked.drawn, strict=True))
    again = tokenizer.look(looked.drawn).features["original"]
    scores = {
        "psnr": float(np.mean([psnr(*pair) for pair in pairs])),
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])),
        "frechet": frechet_distance(looked.features["original"], again),
    }
    if items.labels:
        features, labels = tokenizer.look(items.classified).features, torch.tensor(items.labels)
        asked = torch.arange(len(labels)) // len(set(items.labels)) % TEST_SHARE == 0  # whole turns of all classes
        for name, rows in features.items():
            scores[f"probe/{name}"] = probe_accuracy(rows[~asked], labels[~asked], rows[asked], labels[asked])
    shown = [(name, picture) for pair in pairs[:SHOWN] for name, picture in zip(("true", "drawn"), pair, strict=True)]
    return SuiteResult(scores, {"pictures": len(pairs), "classified": len(items.labels)}, shown)


SUITE = Suite(
    name="reconstruction",
    about="pictures that a tokenizer draws again, and what its streams tell apart",
    num_samples=256,
    draws=False,
    needs_targets=False,
    load=load_items,
    run=run,
    of_tokenizers=True,
)
