"""Soft tokens in packed batches: the embeddings that stand at the placeholders of an image.

An example's embeddings are packed beside its tokens, in the same rows and the same order, so the
n-th placeholder of a row has the n-th embedding of the row. A batch has soft_embeddings
float16[B, M, W] and soft_index int32[B, S], -1 where a token is a token. Without images nothing is
added, neither to what is packed nor to a batch.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5x_audio.errors import UserError

DTYPE = np.dtype(np.float16)


@dataclasses.dataclass(frozen=True)
class SoftEmbeddings:
    """What of them a row has room for.

    Attributes:
      count: M, at most so many in a row; 0: none at all.
      width: W, of each.
      placeholder: id of the tokens they stand for; None where no task has any.
    """

    count: int = 0
    width: int = 0
    placeholder: int | None = None

    def of_tasks(self, stats: Mapping[str, dict]) -> "SoftEmbeddings":
        """With the placeholder of these tasks: name -> stats.json.

        UserError where a task's embeddings are of another width or do not fit a row.
        """
        found = {name: s["soft_embeddings"] for name, s in stats.items() if "soft_embeddings" in s}
        for name, made in found.items():
            if made["width"] != self.width or made["most"] > self.count:
                raise UserError(
                    f"task {name!r} has up to {made['most']} soft tokens of width {made['width']} "
                    f"in an example; the run has room for {self.count} of width {self.width} in a "
                    f"row: give IMAGES_SOFT_TOKENS={made['most']} or more and "
                    f"IMAGES_SOFT_WIDTH={made['width']} (gin/tasks/images.gin)"
                )
        ids = {made["placeholder"] for made in found.values()}
        return dataclasses.replace(self, placeholder=min(ids, default=None))

    def shapes(self, rows: int, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The fields that a batch has besides."""
        if not self.count:
            return {}
        index = (rows, length), np.dtype(np.int32)
        return {"soft_embeddings": ((rows, self.count, self.width), DTYPE), "soft_index": index}

    @property
    def lengths(self) -> dict[str, int]:
        """For the packer: the room in a row."""
        return {"soft_embeddings": self.count} if self.count else {}

    @property
    def padding(self) -> dict[str, int]:
        """For the packer: what fills it up."""
        return dict.fromkeys(self.lengths, 0)

    def columns(self, example: Mapping) -> dict[str, np.ndarray]:
        """Of a cached example, for the packer."""
        if not self.count:
            return {}
        found = example.get("soft_embeddings")
        if found is None:
            found = np.zeros((0, self.width), DTYPE)
        if len(found) != np.count_nonzero(self._held(example["tokens"])):
            raise UserError(
                "a cached example has other placeholders than soft tokens: delete the caches and "
                "run t5x_audio.cache_tasks again"
            )
        return {"soft_embeddings": found}

    def fields(self, row: Mapping, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Of a packed row with these tokens, for the batch."""
        if not self.count:
            return {}
        held = self._held(tokens)
        index = np.where(held, np.cumsum(held) - 1, -1).astype(np.int32)
        return {"soft_embeddings": row["soft_embeddings"], "soft_index": index}

    def _held(self, tokens: np.ndarray) -> np.ndarray:
        """Where a placeholder stands."""
        if self.placeholder is None:
            return np.zeros(tokens.shape, bool)
        return tokens == self.placeholder
