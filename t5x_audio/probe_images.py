"""Judges a trained image encoder by linear probes of its features, quantised to several widths.

    python -m t5x_audio.probe_images --gin_file=gin/models/siamese_laptop.gin \
      --gin_file=gin/runs/probe_images.gin --model_dir=runs/images/ssql --gin.IMAGES_SOURCE=...

Writes <model_dir>/probe.json: the top-1 accuracy on the split test for each pair of bits. The
encoder is that of the directory's latest checkpoint; quantisation is simulated.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_audio.evaluation.linear_probe import LinearProbe
    from t5x_audio.images.augmentation import ImageAugmentation

PROBE_FILE = "probe.json"


def run(
    *,
    model_dir: str,
    source: str,
    data_dir: str | None = None,
    bits: Sequence[tuple[int, int]] = (),
    calibration_images: int = 128,
    batch_size: int = 500,
    probe: "LinearProbe | None" = None,
    augmentation: "ImageAugmentation | None" = None,
) -> dict[str, Any]:
    """Probes and writes the accuracies.

    Args:
      model_dir: a trained `images.siamese` model.
      source, data_dir: the images, see `image_reader.load`.
      bits: (of weights, of activations); (0, 0) is unquantised; () all that are published.
      calibration_images: training images, the first ones of the set, for the ranges.
      batch_size: images the encoder takes at a time.
      probe: how the classifier learns.
      augmentation: only its normalisation counts: that of the training.

    Returns:
      step, images and the accuracy of each pair by name ('FP', 'W4A4').

    Raises:
      UserError: no such model, images or bits, or a range that cannot be taken.
    """
    from tqdm import tqdm

    from t5x_audio import launch
    from t5x_audio.data import image_reader
    from t5x_audio.evaluation import linear_probe
    from t5x_audio.images import resnet
    from t5x_audio.images.augmentation import ImageAugmentation
    from t5x_audio.quantization.rules import Rules
    from t5x_audio.training import checkpoints

    pairs = [tuple(pair) for pair in bits] or list(linear_probe.BIT_PAIRS)
    for pair in pairs:
        linear_probe.require_pair(pair)
    probe = probe or linear_probe.LinearProbe()
    model = checkpoints.load_model(model_dir)
    images = image_reader.load(source, data_dir)
    features = linear_probe.QuantizedFeatures(
        model.encoder,
        Rules(resnet.WEIGHTS, resnet.ACTIVATIONS),
        (augmentation or ImageAugmentation()).normalize,
        images.train_images[:calibration_images],
        batch_size,
    )
    accuracies = {}
    for pair in tqdm(pairs, desc="probes", unit="probe"):
        train = features(images.train_images, pair), images.train_labels
        test = features(images.test_images, pair), images.test_labels
        name = linear_probe.bit_name(pair)
        accuracies[name] = probe.accuracy(train, test, images.num_classes)
    step = checkpoints.checkpoint_steps(model_dir)[-1]
    result = {"step": step, "images": len(images.test_labels)} | accuracies
    path = os.path.join(model_dir, PROBE_FILE)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
    os.replace(f"{path}.tmp", path)
    launch.save_operative_config(model_dir)
    return result


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.probe_images", description=__doc__)
