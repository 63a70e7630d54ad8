"""The layout of a run directory: what the whole life of an audio LLM leaves behind, by name.

Every path of `runs/<size>/` is named here once for those who use a finished run (inference,
evaluation, the report), and the parts that must agree in size are held against each other before
anything is computed: the vocabulary, the two codebooks, the backbone's table and the vocoder's.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import Vocabulary
from t5x_audio.training import checkpoints

PARTS = {
    "vocabulary": "train_vocabulary",
    "linguistic_tokenizer": "fit_codebook",
    "semantic": "train_semantic",
    "merged": "merge",
    "flow": "train_flow",
    "hift": "train_hift",
}
"""What answering needs: folder -> the stage that makes it."""

SOUND_PARTS = ("linguistic_tokenizer", "semantic", "flow", "hift")
"""What speech needs to become codes and speech again."""

COMMIT_FILE = "_CHECKPOINT_METADATA"  # Orbax writes the time of the save into it


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths of a run directory. Nothing is read before it is asked for.

    Attributes:
      root: e.g. runs/demo.
    """

    root: pathlib.Path

    def __post_init__(self):
        object.__setattr__(self, "root", pathlib.Path(self.root))

    def corpus(self, name: str) -> pathlib.Path:
        """Recordings of a corpus: "spoken_qa" or "asterisk"."""
        return self.root / "corpus" / name

    def tokens(self, name: str) -> pathlib.Path:
        """The same corpus as codes."""
        return self.root / "tokens" / name

    def stage(self, folder: str) -> pathlib.Path:
        """The folder of a trained stage, e.g. "sft1" or "flow"."""
        return self.root / folder

    @property
    def vocabulary(self) -> pathlib.Path:
        """vocabulary.json and sentencepiece.model."""
        return self.root / "vocabulary"

    @property
    def linguistic_tokenizer(self) -> pathlib.Path:
        """Encoder and codebook of the linguistic stream."""
        return self.root / "linguistic_tokenizer"

    @property
    def semantic_tokenizer(self) -> pathlib.Path:
        """Encoder and codebook of the semantic stream."""
        return self.root / "semantic"

    @property
    def backbone(self) -> pathlib.Path:
        """The language model that answers: the merge of the post-trained ones."""
        return self.root / "merged"

    @property
    def flow(self) -> pathlib.Path:
        """Codes to mel spectrogram."""
        return self.root / "flow"

    @property
    def speaker_embedding(self) -> pathlib.Path:
        """Embedding of the voice that answers."""
        return self.flow / "speaker_embedding.npz"

    @property
    def speaker_embeddings(self) -> pathlib.Path:
        """Embeddings of all recordings, from the training of the vocoder."""
        return self.root / "tokens" / "speaker_embeddings.npz"

    @property
    def speaker_encoder(self) -> pathlib.Path:
        """CAM++, where a run has one of its own: imported or trained."""
        return self.root / "speaker_encoder"

    @property
    def hift(self) -> pathlib.Path:
        """Mel spectrogram to waveform."""
        return self.root / "hift"

    @property
    def evaluation(self) -> pathlib.Path:
        """Results and examples of the evaluation."""
        return self.root / "evaluation"

    @property
    def resynthesis(self) -> pathlib.Path:
        """Results of resynthesis."""
        return self.root / "resynthesis"

    @property
    def ledger(self) -> pathlib.Path:
        """When each stage was finished and how long it took."""
        return self.root / "stages.json"

    def check(self) -> Vocabulary:
        """The vocabulary, after making sure that every part of an assistant is there and fits.

        Raises:
          UserError: a part is missing (naming the stage that makes it) or of another size.
        """
        self._require(PARTS)
        vocabulary = Vocabulary.load(str(self.vocabulary))
        for folder, what, size, wanted in self._sizes(vocabulary):
            if size != wanted:
                raise UserError(
                    f"{folder}: {what} is {size} but the vocabulary in {self.vocabulary} needs "
                    f"{wanted}; these parts belong to different runs, train this one again"
                )
        return vocabulary

    def check_sound(self) -> tuple[int, int]:
        """Sizes of both codebooks, after making sure that tokenizers and vocoder are there and fit.

        Raises:
          UserError: as `check`.
        """
        self._require(SOUND_PARTS)
        linguistic = self.config(self.linguistic_tokenizer).codebook_size
        semantic = self.config(self.semantic_tokenizer).codebook_size
        if (found := self.config(self.flow).codebook) != linguistic + semantic:
            raise UserError(
                f"{self.flow}: codebook is {found} but the tokenizers have {linguistic} + "
                f"{semantic} codes; these parts belong to different runs, train this one again"
            )
        return linguistic, semantic

    def _require(self, parts: Iterable[str]) -> None:
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such run directory; run `make demo` to make one")
        for folder in parts:
            if not (self.root / folder).is_dir():
                raise UserError(
                    f"{self.root}: has no {folder}/; run its stage {PARTS[folder]} first"
                )

    def _sizes(self, vocabulary: Vocabulary) -> list[tuple[pathlib.Path, str, int, int]]:
        """Rows of (folder, what, its size there, its size by the vocabulary)."""
        linguistic = self.config(self.linguistic_tokenizer)
        semantic = self.config(self.semantic_tokenizer)
        backbone, flow = self.config(self.backbone), self.config(self.flow)
        linguistic_size = vocabulary.linguistic_size
        return [
            (self.linguistic_tokenizer, "codebook_size", linguistic.codebook_size, linguistic_size),
            (self.semantic_tokenizer, "codebook_size", semantic.codebook_size,
             vocabulary.semantic_size),
            (self.backbone, "vocab_size", backbone.vocab_size, vocabulary.size),
            (self.flow, "codebook", flow.codebook, vocabulary.audio_size),
            # The flow of paired codes has them apart.
            (self.flow, "linguistic_size", getattr(flow, "linguistic_size", linguistic_size),
             linguistic_size),
        ]  # fmt: skip

    def fingerprint(self, parts: Iterable[str] = tuple(PARTS)) -> str:
        """Changes when the weights of any part do; the same for a copy of the directory."""
        digest = hashlib.sha256()
        for folder in parts:
            path = self.root / folder
            steps = checkpoints.checkpoint_steps(path)
            commit = path / "checkpoints" / str(steps[-1] if steps else 0) / COMMIT_FILE
            digest.update(f"{folder} {steps[-1:]}".encode())
            digest.update(commit.read_bytes() if commit.is_file() else b"")
        return digest.hexdigest()[:16]

    def config(self, folder: pathlib.Path, name: str = "model") -> Any:
        """Configuration of one model. UserError when it is missing or unreadable."""
        return checkpoints.load_config(folder, name)
