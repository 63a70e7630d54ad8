"""One vocabulary for text and audio, from a lesson's few hundred ids to the published 74,752.

The ids, in order: text (SentencePiece), linguistic codes, semantic codes, our specials, rows that
pad the table to a multiple the hardware likes. A small model is the same order with smaller
numbers. The published sizes are the defaults: 65,536 + 1,024 + 4,096 + 4,096 = 74,752 rows
(Step-Audio, arXiv 2502.11946; config.json of Step-Audio-Chat), where the meaning of the last
4,096 rows is not published: `audio_start` and the others are our own assignment.

Three names for an audio token: the code of its own stream (0-based), the *flat local code*
(linguistic c -> c, semantic c -> linguistic_size + c; what the vocoder takes; text form
`<audio_N>`) and the *LM id* (flat local code + audio_offset).
"""

import dataclasses
import functools
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence

import numpy as np

from t5x_audio.errors import UserError

TEXT, LINGUISTIC, SEMANTIC, SPECIAL = range(4)
MODALITIES = ("text", "linguistic", "semantic", "special")
ROLES = ("system", "human", "assistant")
# System turns: what a chat asks for. One piece each in vocabularies of our own.
TRANSCRIBE = "transcribe the speech"
SPEAK = "speak the text"
ANSWER_IN_TEXT = "answer in text"
ANSWER_IN_SPEECH = "answer in speech"
INSTRUCTIONS = (TRANSCRIBE, SPEAK, ANSWER_IN_TEXT, ANSWER_IN_SPEECH)

# Fixed by the published SentencePiece model; ours is trained to agree.
UNK, BOS, EOS, EOT, BOT = range(5)
_CONTROLS = {BOS: "<s>", EOS: "</s>", EOT: "<|EOT|>", BOT: "<|BOT|>"}
_NEEDED = ("<audio_start>", "<audio_end>", "<text_end>", "<pad>")
# Behind the others, which keep their ids; a vocabulary may have no rows for them.
_OF_IMAGES = ("<image_start>", "<image_end>", "<image>")
_SPECIALS = (*_NEEDED, *_OF_IMAGES)
_SURFACE = re.compile("<audio_([0-9]+)>|(" + "|".join(map(re.escape, _SPECIALS)) + ")")
_PRINTABLE = "".join(map(chr, range(32, 127)))

VOCABULARY_FILE = "vocabulary.json"
SENTENCEPIECE_FILE = "sentencepiece.model"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Sizes and meaning of every id. All array methods are vectorised and return int32.

    Attributes:
      text_size: rows for text; the SentencePiece model may fill fewer of them.
      linguistic_size, semantic_size: codebook sizes of the two tokenizers.
      num_specials: rows kept for specials (at least 4: audio_start, audio_end, text_end, pad; 7
        with image_start, image_end, image).
      multiple_of: `size` is rounded up to a multiple of this.
      sentencepiece: path of the SentencePiece model; None where no text is handled.
      prefix_space: a text is encoded as if a space stood before it, so that a word is the same
        piece at the start and within. True for `train_sentencepiece` models; the published chat
        format puts the text right behind the newline, so False there.
      lowercase: text is lower-cased before it is encoded. False for the published model.
    """

    text_size: int = 65536
    linguistic_size: int = 1024
    semantic_size: int = 4096
    num_specials: int = 4096
    multiple_of: int = 1024
    sentencepiece: str | None = None
    prefix_space: bool = True
    lowercase: bool = True

    def __post_init__(self):
        if self.num_specials < len(_NEEDED) or self.text_size <= BOT:
            raise UserError(
                f"Vocabulary: num_specials={self.num_specials} must be at least {len(_NEEDED)} "
                f"and text_size={self.text_size} more than {BOT}"
            )

    # ---- the map of ids -------------------------------------------------------------------

    unk, bos, eos, eot, bot = UNK, BOS, EOS, EOT, BOT

    @property
    def audio_offset(self) -> int:
        """LM id of flat local code 0."""
        return self.text_size

    @property
    def audio_size(self) -> int:
        """Number of flat local codes."""
        return self.linguistic_size + self.semantic_size

    @property
    def semantic_offset(self) -> int:
        """LM id of semantic code 0 (linguistic code 0 is at `audio_offset`)."""
        return self.audio_offset + self.linguistic_size

    @property
    def specials_offset(self) -> int:
        """LM id of the first special."""
        return self.audio_offset + self.audio_size

    @property
    def audio_start(self) -> int:
        """Opens a span of audio ids given as content."""
        return self.specials_offset

    @property
    def audio_end(self) -> int:
        """Closes a span of audio ids, and the audio channel of an answer."""
        return self.specials_offset + 1

    @property
    def text_end(self) -> int:
        """Closes the text channel of an AQAA answer."""
        return self.specials_offset + 2

    @property
    def pad(self) -> int:
        """Fills batches; never attended to and never a target."""
        return self.specials_offset + 3

    @property
    def image_start(self) -> int:
        """Opens an image."""
        return self._of_images(0)

    @property
    def image_end(self) -> int:
        """Closes an image."""
        return self._of_images(1)

    @property
    def image(self) -> int:
        """Holds the place of a soft token, an embedding of an image."""
        return self._of_images(2)

    def _of_images(self, index: int) -> int:
        if self.num_specials < len(_SPECIALS):
            raise UserError(
                f"the vocabulary has num_specials={self.num_specials}, and images need "
                f"{len(_SPECIALS)}: set SEQUENCES_NUM_SPECIALS and run t5x_audio.train_vocabulary"
            )
        return self.specials_offset + len(_NEEDED) + index

    @property
    def size(self) -> int:
        """Rows of the embedding table."""
        rows = self.specials_offset + self.num_specials
        return -(-rows // self.multiple_of) * self.multiple_of

    @functools.cached_property
    def modality_table(self) -> np.ndarray:
        """int32[size]: TEXT, LINGUISTIC, SEMANTIC or SPECIAL of every id (controls are SPECIAL)."""
        table = np.full(self.size, SPECIAL, np.int32)
        table[: self.text_size] = TEXT
        table[list(_CONTROLS)] = SPECIAL
        table[self.audio_offset : self.semantic_offset] = LINGUISTIC
        table[self.semantic_offset : self.specials_offset] = SEMANTIC
        return table

    def modality(self, ids) -> np.ndarray:
        """Modality of each LM id; any shape in, the same shape out."""
        return self.modality_table[np.asarray(ids)]

    def is_audio(self, ids) -> np.ndarray:
        """True where an LM id is a linguistic or semantic code."""
        ids = np.asarray(ids)
        return (ids >= self.audio_offset) & (ids < self.specials_offset)

    def from_local(self, codes) -> np.ndarray:
        """Flat local codes -> LM ids. UserError when a code is outside both codebooks."""
        codes = np.asarray(codes, np.int32)
        _check_range(codes, 0, self.audio_size, "flat local code")
        return codes + np.int32(self.audio_offset)

    def to_local(self, ids) -> np.ndarray:
        """LM ids of audio -> flat local codes. UserError when an id is not audio."""
        ids = np.asarray(ids, np.int32)
        _check_range(ids, self.audio_offset, self.specials_offset, "audio id")
        return ids - np.int32(self.audio_offset)

    @property
    def _specials(self) -> tuple[str, ...]:
        return _SPECIALS[: self.num_specials]

    # ---- text -----------------------------------------------------------------------------

    @functools.cached_property
    def _processor(self):
        import sentencepiece

        if self.sentencepiece is None or not os.path.exists(self.sentencepiece):
            raise UserError(
                f"no SentencePiece model at {self.sentencepiece}: run t5x_audio.train_vocabulary"
            )
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.Load(self.sentencepiece)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.sentencepiece} is not a SentencePiece model") from error
        if processor.GetPieceSize() > self.text_size:
            raise UserError(
                f"{self.sentencepiece} has {processor.GetPieceSize()} pieces, more than "
                f"text_size={self.text_size}"
            )
        return processor

    @property
    def num_pieces(self) -> int:
        """Text ids that the SentencePiece model really uses (<= text_size)."""
        return self._processor.GetPieceSize()

    def _encode(self, text: str) -> list[int]:
        # Behind a newline that is then taken away: the model's own prefix space, if it adds one,
        # lands before the newline (the trick of the published tts.py).
        skip = len(self._processor.EncodeAsIds("\n"))
        return self._processor.EncodeAsIds("\n" + text)[skip:]

    def encode_text(self, text: str) -> np.ndarray:
        """Text -> int32 ids; '' -> no ids. Control symbols in `text` are plain characters."""
        if self.lowercase:
            text = text.lower()
        if not text:
            return np.zeros(0, np.int32)
        return np.asarray(self._encode(" " + text if self.prefix_space else text), np.int32)

    def encode_header(self, role: str) -> np.ndarray:
        """`role` + newline -> int32 ids, as it stands behind <|BOT|>."""
        if role not in ROLES:
            raise UserError(f"chat role {role!r} is not one of {', '.join(ROLES)}")
        return np.asarray(self._encode(role + "\n"), np.int32)

    def decode_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text. Ids that are not text (controls, audio, unused rows) leave no trace."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        ids = ids[(ids >= 0) & (ids < self.num_pieces)]
        ids = [int(i) for i in ids if int(i) not in _CONTROLS]
        # Behind a newline again, else the model strips a leading space that belongs to the text.
        text = self._processor.DecodeIds(self._processor.EncodeAsIds("\n") + ids)
        text = text[text.find("\n") + 1 :]
        return text[1:] if self.prefix_space and text.startswith(" ") else text

    # ---- surface form ---------------------------------------------------------------------

    def surface(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids as one readable string: text as text, audio as <audio_N>, specials by name."""
        named = {**_CONTROLS, **{self.specials_offset + i: n for i, n in enumerate(self._specials)}}
        out, text = [], []
        for token in map(int, np.asarray(ids).reshape(-1)):
            plain = token < self.text_size and token not in _CONTROLS
            if plain:
                text.append(token)
                continue
            out.append(self.decode_text(text) if text else "")
            text = []
            is_audio = self.audio_offset <= token < self.specials_offset
            form = f"<audio_{token - self.audio_offset}>"
            out.append(form if is_audio else named.get(token, f"<id_{token}>"))
        return "".join(out) + (self.decode_text(text) if text else "")

    def parse_audio(self, surface: str) -> np.ndarray:
        """A string of <audio_N> (and our specials) -> LM ids; anything else is a UserError."""
        ids, end = [], 0
        for match in _SURFACE.finditer(surface):
            unknown = match[2] is not None and match[2] not in self._specials
            if unknown or surface[end : match.start()].strip():
                break
            end = match.end()
            if match[1] is None:
                ids.append(self.specials_offset + _SPECIALS.index(match[2]))
            else:
                ids.append(int(self.from_local(int(match[1]))))
        if surface[end:].strip():
            raise UserError(f"not an audio token: {surface[end : end + 24]!r} (want <audio_N>)")
        return np.asarray(ids, np.int32)

    # ---- files ----------------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        """The numbers that must agree between a vocabulary, a token cache and a model."""
        names = ("text_size", "linguistic_size", "semantic_size", "num_specials", "multiple_of")
        return {name: getattr(self, name) for name in names} | {"size": self.size}

    def save(self, directory: str) -> None:
        """Writes vocabulary.json and a copy of the SentencePiece model into `directory`."""
        os.makedirs(directory, exist_ok=True)
        target = os.path.join(directory, SENTENCEPIECE_FILE)
        if self.sentencepiece and os.path.abspath(self.sentencepiece) != os.path.abspath(target):
            shutil.copyfile(self.sentencepiece, target + ".tmp")
            os.replace(target + ".tmp", target)
        fields = dataclasses.asdict(self)
        fields["sentencepiece"] = SENTENCEPIECE_FILE if self.sentencepiece else None
        path = os.path.join(directory, VOCABULARY_FILE)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(fields, f, indent=2)
        os.replace(path + ".tmp", path)

    @classmethod
    def load(cls, directory: str) -> "Vocabulary":
        """Reads what `save` wrote. UserError when it is missing or damaged."""
        path = os.path.join(directory, VOCABULARY_FILE)
        try:
            with open(path, encoding="utf-8") as f:
                fields = json.load(f)
            if fields.get("sentencepiece"):
                fields["sentencepiece"] = os.path.join(directory, fields["sentencepiece"])
            return cls(**fields)
        except FileNotFoundError:
            raise UserError(f"no vocabulary at {path}: run t5x_audio.train_vocabulary") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a vocabulary ({error}): make it again") from error


def _check_range(values: np.ndarray, low: int, high: int, name: str) -> None:
    bad = (values < low) | (values >= high)
    if np.any(bad):
        raise UserError(f"{name} {int(values[bad].flat[0])} is outside [{low}, {high})")


def train_sentencepiece(texts: Iterable[str], prefix: str, size: int) -> str:
    """Trains a BPE model of at most `size` pieces; writes `<prefix>.model` and returns its path.

    The ids 0..4 are <unk> <s> </s> <|EOT|> <|BOT|>; each chat header and each of `INSTRUCTIONS`
    is one piece, as they would be a good part of a short example otherwise. Every printable ASCII
    character and the newline have a piece, so any English text encodes; from 2,048 pieces on there
    is room for byte fallback too, which covers every other script. The same texts give the same
    file. UserError when `size` is too small or there is no text.
    """
    import sentencepiece

    lines = [" " + line for text in texts for line in text.lower().splitlines() if line.strip()]
    if not lines:
        raise UserError("cannot train a vocabulary from no text: is the corpus empty?")
    fixed = [role + "\n" for role in ROLES]
    fixed += ["\u2581" + text.replace(" ", "\u2581") for text in INSTRUCTIONS]
    # Upper case is left to byte fallback: small models are only given lower-cased text.
    characters = "".join(sorted(set(_PRINTABLE.lower()) - {" "})) + "\n"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=size >= 2048,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            control_symbols=[_CONTROLS[EOT], _CONTROLS[BOT]],
            user_defined_symbols=fixed,
            required_chars=characters,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,  # more threads would not change the result, but promise nothing
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"SentencePiece cannot train {size} pieces: {reason}") from error
    os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
    path = prefix + ".model"
    with open(path + ".tmp", "wb") as f:
        f.write(model.getvalue())
    os.replace(path + ".tmp", path)
    return path
