"""Fits the codebook of the linguistic tokenizer: k-means over the trained encoder's outputs.

Reads the CTC-trained encoder of `<run_dir>/linguistic`, runs it over training clips in a random
order until `max_frames` are gathered, and writes the same model with its codebook filled to
`model_dir`. The published recipe is k-means with 1,024 centres (Step-Audio, arXiv 2502.11946,
section 3.1); how its data were chosen is not published.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

SUMMARY_FILE = "codebook.json"
CHUNK_CLIPS = 512  # read and encoded at a time


def run(
    *,
    model_dir: str,
    run_dir: str,
    corpora: Sequence[str] | None = None,
    max_frames: int = 2_000_000,
    batch_frames: int = 65_536,
    num_epochs: int = 10,
    seed: int = 0,
) -> dict:
    """Fits and saves the codebook; one made from the same encoder and settings is left as it is.

    Args:
      model_dir: where the tokenizer is written.
      run_dir: its linguistic/ and corpus/<name>/ are read.
      corpora: names of corpora; None = all.
      max_frames: encoder frames (60 ms each) to cluster, held in memory.
      batch_frames: of a mini-batch; the first also seeds the centres.
      num_epochs: passes over the frames.
      seed: of the choice of clips and of the clustering.

    Returns:
      Figures of the last pass. UserError when the encoder or a corpus is missing.
    """
    from t5x_audio import launch
    from t5x_audio.data import audio_reader
    from t5x_audio.tokenizers import kmeans
    from t5x_audio.training import checkpoints

    model = checkpoints.load_model(os.path.join(run_dir, "linguistic"))
    directories = audio_reader.corpora_of(run_dir, corpora)
    settings = [directories, max_frames, batch_frames, num_epochs, seed]
    made_from = {"encoder": fingerprint(model), "settings": settings}
    summary = _read_summary(model_dir)
    if summary and summary["made_from"] == made_from:
        return {"model_dir": model_dir, "already_there": True, **summary["figures"]}
    frames = _gather_frames(model, directories, max_frames, seed)
    sharding = _over_devices()
    count = max(1, len(frames) // batch_frames)
    even = len(frames) // (count * sharding.num_devices) * count * sharding.num_devices
    centres, metrics = kmeans.fit(
        np.split(frames[:even], count),
        model.config.codebook_size,
        seed=seed,
        num_epochs=num_epochs,
        on_epoch=_print_epoch(num_epochs),
        sharding=sharding,
    )
    model.codebook[...] = centres
    checkpoints.save_model(model_dir, {"model": model.config}, {"model": model})
    launch.save_operative_config(model_dir)
    explained = 1.0 - metrics.pop("inertia") / float(np.sum(np.var(frames, axis=0)))
    figures = {
        "codes": model.config.codebook_size,
        "frames": len(frames),
        "variance_explained": explained,
        **metrics,
    }
    _write_summary(model_dir, {"made_from": made_from, "figures": figures})
    return {"model_dir": model_dir, **figures}


def _over_devices():
    """Points of a batch spread over all devices of this process."""
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def fingerprint(*modules) -> str:
    """A digest of the weights and state of modules."""
    import jax
    from flax import nnx

    digest = hashlib.sha256()
    for module in modules:
        for leaf in jax.tree.leaves(nnx.state(module)):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _gather_frames(model, directories: Sequence[str], max_frames: int, seed: int) -> np.ndarray:
    """Encoder outputs float32 [<= max_frames, D] of random training clips, in random order."""
    from tqdm import tqdm

    from t5x_audio.tokenizers import batching

    encoder = batching.BucketedEncoder(model, "encode_frames")
    generator = np.random.default_rng(seed)
    gathered, count = [], 0
    with tqdm(total=max_frames, desc="encode", unit=" frames", unit_scale=True) as progress:
        for waveforms in _random_clips(directories, generator):
            new = np.concatenate(encoder(waveforms))
            gathered.append(new)
            count += len(new)
            progress.update(min(len(new), max_frames - progress.n))
            if count >= max_frames:
                break
    frames = np.concatenate(gathered)
    return generator.permutation(frames)[:max_frames]


def _random_clips(directories: Sequence[str], generator) -> Iterator[list[np.ndarray]]:
    """Level-normalised training clips of all corpora in random order, some hundred at a time."""
    from t5x_audio.audio import transforms
    from t5x_audio.data import corpus, records

    readers = [records.open_records(path, "train") for path in directories]
    places = [(reader, i) for reader in readers for i in range(len(reader))]
    order = generator.permutation(len(places))
    for start in range(0, len(order), CHUNK_CLIPS):
        chosen = [places[i] for i in order[start : start + CHUNK_CLIPS]]
        clips = [corpus.Clip.from_record(reader[i]) for reader, i in chosen]
        yield [transforms.normalize_energy(clip.samples) for clip in clips]


def _print_epoch(num_epochs: int):
    def report(epoch: int, metrics: dict) -> None:
        print(
            f"k-means pass {epoch + 1}/{num_epochs}: inertia {metrics['inertia']:.4g}, "
            f"usage {metrics['usage']:.3f}, perplexity {metrics['perplexity']:.1f}",
            flush=True,
        )

    return report


def _read_summary(model_dir: str) -> dict | None:
    try:
        with open(os.path.join(model_dir, SUMMARY_FILE), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _write_summary(model_dir: str, summary: dict) -> None:
    path = os.path.join(model_dir, SUMMARY_FILE)
    with open(f"{path}.writing", "w", encoding="utf-8") as file:
        json.dump(summary, file)
    os.replace(f"{path}.writing", path)


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.fit_codebook", description=__doc__)
