"""Writes the SeqIO tasks of a run as caches that training reads without TensorFlow.

For every task, each split that has examples becomes `<model_dir>/<task>/<split>-*.array_record`,
with its lengths and stats.json beside it (see `tasks.caching`). A task is built under a temporary
name and renamed when it is whole. One that is up to date with the tokens, the vocabulary and the
answer's ratio is passed over.
"""

import os
from collections.abc import Mapping, Sequence

from t5x_audio import launch
from t5x_audio.errors import UserError


def run(
    *,
    model_dir: str,
    run_dir: str,
    mixtures: Mapping[str, Mapping[str, float]],
    extra_tasks: Sequence[str] = (),
    num_shards: int = 1,
    text_block: int = 10,
    audio_block: int = 15,
    sequence_length: int = 512,
) -> dict:
    """Caches every task that a mixture or `extra_tasks` names.

    Args:
      model_dir: where the caches go, one directory a task; training reads `<run_dir>/tasks`.
      run_dir: the run; its vocabulary/, tokens/, corpus/ and images/ are read.
      mixtures: name -> {task: share of the tokens}.
      extra_tasks: tasks in no mixture, such as preference pairs.
      num_shards: files a split.
      text_block, audio_block: ratio of a spoken answer.
      sequence_length: of the rows that long texts are cut for.

    Returns:
      Figures for the closing line. UserError for an unknown task, bad shares or missing tokens.
    """
    import tasks
    from t5x_audio.data import lm_reader, records
    from t5x_audio.sequences.vocabulary import Vocabulary
    from tasks import caching, image_text
    from tasks.corpus import TokenCorpus

    for shares in mixtures.values():
        lm_reader.positive_rates(shares)
    names = list(dict.fromkeys([*(t for m in mixtures.values() for t in m), *extra_tasks]))
    unknown = [name for name in names if name not in tasks.TASKS]
    if unknown:
        raise UserError(f"no task is called {unknown[0]!r}: choose from {', '.join(tasks.TASKS)}")
    vocabulary = Vocabulary.load(os.path.join(run_dir, "vocabulary"))
    corpus = TokenCorpus(run_dir, vocabulary)
    if image_text.NAME in names:
        image_text.require(corpus)
    settings = (text_block, audio_block, num_shards, sequence_length)
    made_from = caching.fingerprint(corpus, vocabulary, settings)
    directories = {name: os.path.join(model_dir, name) for name in names}
    missing = [
        name for name, path in directories.items() if not caching.is_current(path, made_from)
    ]
    if missing:
        tasks.register_all(run_dir, vocabulary, mixtures, text_block, audio_block, sequence_length)
        for name in _progress(missing):
            caching.cache(name, directories[name], vocabulary, num_shards, made_from)
    stats = [lm_reader.read_stats(path) for path in directories.values()]
    splits = [s[split] for s in stats for split in records.SPLITS if split in s]
    return {
        "tasks": len(names),
        "made": len(missing),
        "already_there": len(names) - len(missing),
        "examples": sum(split["examples"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
    }


def _progress(names: list[str]):
    import tqdm

    bar = tqdm.tqdm(names, unit="task")
    for name in bar:
        bar.set_description(name)
        yield name


if __name__ == "__main__":
    launch.main("t5x_audio.cache_tasks", description=__doc__)
