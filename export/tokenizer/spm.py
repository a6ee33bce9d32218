"""Make tokenizer.json of a sentencepiece model, and hold it against sentencepiece itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from cuantiza.core.errors import UserError

# Classes of transformers whose token ids are the model's own. Others, such as XLMRobertaTokenizer, shift them.
WITH_OWN_IDS = (
    "T5Tokenizer",
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GPTSw3Tokenizer",
    "GPT2Tokenizer",
    "PreTrainedTokenizer",
)
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type there
# At the ends of the text, not of its lines, in the regular expressions of tokenizers and of JavaScript.
_OUTER_SPACES = r"(?<![\s\S]) +| +(?![\s\S])"
# A token in base64 and its id, in the first of many such lines.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_TEXTS = (
    "¿Dónde está el camión? ¡Qué vergüenza, Ñuñoa!",
    " dos  espacios\ty un tabulador, 1987, 3,5 % y 20 °C…\n\nOtro párrafo  ",
    "\nuna línea  \n\n  y otra\n",
    "crème brûlée, 日本語のテスト, 🦎 e\u0301 ﬁn, Привет, 12 345",
)


def from_sentencepiece(path: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of tokenizer.json for the sentencepiece model `path`, and `settings` with its special tokens.

    transformers 5 assumes ids of the unknown token and of others by the tokenizer's class; here they are the model's.
    Raises UserError if the file is no such model, or if the result splits texts otherwise than sentencepiece does.
    """
    proto = read_model(path)
    trained = proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trained.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{path}: is a sentencepiece model of words or characters; only unigram and BPE are converted")
    # What transformers' Llama classes call legacy is a space before each part of a text that special tokens divide.
    once = settings.get("legacy") is False and trained.model_type == _BPE and proto.normalizer_spec.add_dummy_prefix
    try:
        tokenizer = _tokenizer(proto, pieces, once)
    except Exception as error:  # the Rust library raises bare Exception, for example for an unk_id that no piece has
        raise UserError(f"{path}: is a broken sentencepiece model ({error}); take the original file") from None
    _compare(path, tokenizer, once)
    named = {key: pieces[number][0] for key, number in _special_ids(trained).items() if 0 <= number < len(pieces)}
    return json.loads(tokenizer.to_str()), {**named, **settings}


def _tokenizer(proto: Any, pieces: list[tuple[str, float]], once: bool) -> Tokenizer:
    """The tokenizer that `proto` describes, whose `pieces` are texts with scores. Raises Exception if it is broken.

    `once`: the space that comes before a text does not come after a special token amid it, and not before another space,
    as in transformers' Llama classes where legacy is false.
    """
    trained, normalized = proto.trainer_spec, proto.normalizer_spec
    unknown = pieces[trained.unk_id][0] if 0 <= trained.unk_id < len(pieces) else None
    model: Unigram | BPE
    if trained.model_type == _UNIGRAM:
        model = Unigram(pieces, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    else:
        vocabulary = {text: number for number, (text, _) in enumerate(pieces)}
        merges = _merges(vocabulary, [piece.piece for piece in proto.pieces if piece.type == _NORMAL])
        model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trained.byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if normalized.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalized.precompiled_charsmap))
    if normalized.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(_OUTER_SPACES), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend("▁")] * normalized.add_dummy_prefix + [normalizers.Replace(" ", "▁")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    parts: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*parts, *([decoders.Strip(" ", 1, 0)] if normalized.add_dummy_prefix else [])]
    )
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)])
    if unknown is not None:
        tokenizer.add_special_tokens([AddedToken(unknown, normalized=False, special=True)])
    return tokenizer


def read_model(path: Path) -> Any:
    """The content of a sentencepiece model (`ModelProto`). Raises UserError if `path` holds none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto, data = sentencepiece_model_pb2.ModelProto(), path.read_bytes()
    if _TIKTOKEN.match(data):
        raise UserError(
            f"{path}: is a list of tokens in tiktoken's form, as Llama 3 has it, and no sentencepiece model; "
            "take the tokenizer.json of the model in transformers' format"
        )
    try:
        proto.ParseFromString(data)
        if not proto.pieces:
            raise DecodeError("it has no pieces")
    except DecodeError as error:
        raise UserError(
            f"{path}: is not a sentencepiece model ({error}); take the file of the original checkpoint"
        ) from None
    return proto


def _special_ids(trained: Any) -> dict[str, int]:
    return {
        "bos_token": trained.bos_id,
        "eos_token": trained.eos_id,
        "pad_token": trained.pad_id,
        "unk_token": trained.unk_id,
    }


def _merges(vocabulary: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
    """The merges that make `words`, in the order of the vocabulary, which is that of training."""
    merges = []
    for word in words:
        splits = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        found = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _compare(path: Path, tokenizer: Tokenizer, once: bool) -> None:
    """Raise UserError if `tokenizer` splits a text otherwise than sentencepiece itself.

    A first space is left out for sentencepiece where it takes the place of the one that comes before a text (`once`).
    """
    from sentencepiece import SentencePieceProcessor

    try:
        own = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path}: is not a sentencepiece model ({error}); take the file of the original checkpoint"
        ) from None
    for text in _TEXTS:
        ours, theirs = (
            tokenizer.encode(text, add_special_tokens=False).ids,
            own.encode(text.removeprefix(" ") if once else text),
        )
        if ours != theirs:
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            raise UserError(
                f"{path}: cannot be converted exactly (token {place} of «{text[:20]}…» is {own.id_to_piece(theirs[place])!r} "
                f"in sentencepiece, {tokenizer.id_to_token(ours[place])!r} in tokenizer.json); "
                "put a tokenizer.json beside it that was made for this model"
            )
