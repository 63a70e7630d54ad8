"""Judges a trained language model by the metrics of SeqIO tasks, on their held-out examples.

    python -m t5x_audio.evaluate_tasks --model_dir=runs/tiny/sft1 --run_dir=runs/tiny --task=asr

Every example's texts, target and prediction are written to
`<model_dir>/answers/<task>-<split>.jsonl`. The same tasks can be judged while a model trains:
gin/tasks/answers.gin.
"""

import json
import os

from t5x_audio import launch


def run(
    *,
    model_dir: str,
    run_dir: str,
    task: list[str],
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
) -> dict:
    """Answers the examples of the tasks.

    Args:
      model_dir: of the language model.
      run_dir: the run whose vocabulary/, tokens/ and tasks/ are read.
      task: names of tasks.
      split: 'validation' or 'test'.
      num_examples: of each task; None = all.
      batch_size: answers decoded at once.
      max_new_tokens: bound of an answer's length.

    Returns:
      <task>_<metric> of every task. UserError for a task or model that is not there.
    """
    from t5x_audio.training import checkpoints
    from tasks.evaluation import TaskEvaluation

    evaluation = TaskEvaluation(
        run_dir,
        task,
        split=split,
        num_examples=num_examples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    results = evaluation(checkpoints.load_model(model_dir))
    folder = os.path.join(model_dir, "answers")
    os.makedirs(folder, exist_ok=True)
    for name, triples in evaluation.answered.items():
        path = os.path.join(folder, f"{name}-{split}.jsonl")
        with open(f"{path}.writing", "w", encoding="utf-8") as file:
            for example, target, prediction in triples:
                row = {key: text for key, text in example.items() if isinstance(text, str)}
                row |= {"target": target, "prediction": prediction}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(f"{path}.writing", path)
    figures = {f"{t}_{key}": v for t, values in results.items() for key, v in values.items()}
    return {"answers": folder} | figures


def _add_flags(parser) -> None:
    parser.add_argument("--run_dir", help="the run whose tasks are read", required=True)
    parser.add_argument(
        "--task", action="append", help="name of a task (repeatable)", required=True
    )
    parser.add_argument("--split", help="validation or test; default test")
    parser.add_argument("--num_examples", type=int, help="of each task; default all")
    parser.add_argument("--batch_size", type=int, help="answers decoded at once; default 16")
    parser.add_argument("--max_new_tokens", type=int, help="of an answer; default 256")


if __name__ == "__main__":
    launch.main("t5x_audio.evaluate_tasks", description=__doc__, add_flags=_add_flags)
