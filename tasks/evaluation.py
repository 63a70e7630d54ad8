"""What a model answers to the examples of SeqIO tasks, judged by the tasks' own metrics.

The prompt of an example is what stands before its first target. The model goes on from there, each
time with its likeliest token, until the answer ends; the answer passes through the task's
postprocess_fn into its metric_fns, as in SeqIO's own evaluator. Examples are read from the task
caches, which keep the texts of held-out splits. `train` does this while it trains, and
`t5x_audio.evaluate_tasks` with a model that is there.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from t5x_audio.data import lm_reader, records
from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import Vocabulary


class TaskEvaluation:
    """Calling it with a Transformer gives {task: {metric: value}}.

    Attributes:
      every: steps between two evaluations of a training run.
      answered: task -> [(the example's texts, target, prediction)] of the last evaluation.
    """

    def __init__(
        self,
        run_dir: str,
        tasks: Sequence[str],
        every: int = 1000,
        split: str = "validation",
        num_examples: int | None = 64,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        text_block: int = 10,
        audio_block: int = 15,
    ):
        """Reads the examples and registers the tasks, for which TensorFlow is loaded.

        Args:
          run_dir: the run; its vocabulary/, tokens/ and tasks/ are read.
          tasks: names of tasks that have a prompt and metrics.
          every: see the class.
          split: 'validation' or 'test'.
          num_examples: of each task, spread over the split; None = all.
          batch_size: answers decoded at once.
          max_new_tokens: bound of an answer's length.
          text_block, audio_block: ratio of a spoken answer.

        Raises:
          UserError: an unknown task, one without metrics, prompt or examples, or a bad number.
        """
        import tasks as registry

        for name, value in (("every", every), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"TaskEvaluation.{name}={value}: give 1 or more")
        if split not in ("validation", "test"):
            raise UserError(f"TaskEvaluation.split={split!r}: there are 'validation' and 'test'")
        self.every, self.answered = every, {}
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._vocabulary = Vocabulary.load(os.path.join(run_dir, "vocabulary"))
        registry.register_all(
            run_dir, self._vocabulary, text_block=text_block, audio_block=audio_block
        )
        self._tasks = {name: _task(name) for name in tasks}
        self._examples = {
            name: _examples(os.path.join(run_dir, "tasks", name), split, num_examples)
            for name in tasks
        }
        self._width = max(len(_prompt(e)) for some in self._examples.values() for e in some)

    def __call__(self, model) -> dict[str, dict[str, float]]:
        """Metrics of every task, and `examples`, the number of its answers."""
        from t5x_audio.backbone.decoding import Decoder

        return self.score(Decoder(model, [self._vocabulary.eot, self._vocabulary.eos]))

    def score(self, decoder) -> dict[str, dict[str, float]]:
        """As calling, with what has `generate` of a Decoder."""
        results = {}
        for name, task in self._tasks.items():
            triples = []
            for example, answer in self._answers(decoder, self._examples[name]):
                texts = {k: v.encode() for k, v in example.items() if isinstance(v, str)}
                target, prediction = (
                    task.postprocess_fn(output, example=texts, is_target=is_target)
                    for output, is_target in ((None, True), (answer, False))
                )
                triples.append((example, target, prediction))
            self.answered[name] = triples
            _, targets, predictions = zip(*triples, strict=True)
            results[name] = {"examples": float(len(triples))}
            for metric in task.metric_fns:
                values = metric(list(targets), list(predictions))
                results[name] |= {key: float(value) for key, value in values.items()}
        return results

    def _answers(self, decoder, examples: list[dict]) -> Iterator[tuple[dict, np.ndarray]]:
        """(example, answer tokens) in batches of one shape: the last one repeats its last row."""
        from t5x_audio.backbone.decoding import Sampling

        for start in range(0, len(examples), self._batch_size):
            batch = examples[start : start + self._batch_size]
            prompts = [_prompt(example) for example in batch]
            prompts += [prompts[-1]] * (self._batch_size - len(batch))
            answers = decoder.generate(
                prompts,
                sampling=Sampling(temperature=0.0),
                max_new_tokens=self._max_new_tokens,
                width=self._width,
            )
            yield from zip(batch, answers, strict=False)


def _task(name: str):
    """The registered task. UserError if it is unknown or cannot be judged."""
    import seqio

    if name not in seqio.TaskRegistry.names():
        known = ", ".join(sorted(seqio.TaskRegistry.names()))
        raise UserError(f"no task is called {name!r}: choose from {known}")
    task = seqio.TaskRegistry.get(name)
    if not task.metric_fns:
        raise UserError(f"task {name!r} has no metrics; its loss is all there is to evaluate")
    return task


def _examples(directory: str, split: str, limit: int | None) -> list[dict]:
    """Examples of a task cache, evenly spread over the split."""
    lm_reader.read_stats(directory)  # Says what to run where there is no cache.
    name = os.path.basename(directory)
    if not records.has_split(directory, split):
        raise UserError(f"task {name!r} has no examples in split {split!r}")
    stored = records.open_records(directory, split)
    count = len(stored) if limit is None else min(limit, len(stored))
    places = np.linspace(0, len(stored) - 1, count).round().astype(int)
    examples = [stored[int(place)] for place in places]
    if any("tokens" not in example or len(_prompt(example)) < 2 for example in examples):
        raise UserError(f"task {name!r} has no prompts that a model could answer")
    return examples


def _prompt(example: dict) -> np.ndarray:
    """The tokens before the first target."""
    return example["tokens"][: np.flatnonzero(example["weights"])[0]]
