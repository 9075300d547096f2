"""How well a decoder guesses captions, token by token, beside guesses that look at no picture."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.eval.runner import MIN_COVERAGE
from siglip2.locca.packing import pack_texts
from siglip2.locca.tasks import Encoder, ImageTexts, TaskText, task_texts
from siglip2.models.decoder import Decoder

# At a time: 256 MiB in float32; 16 MiB, as a cache may hold, took half the time on a CPU.
_MOST_LOGITS, _MOST_LOGITS_CPU = 2**26, 2**22


@dataclass
class _Tally:
    """What was guessed of one language's captions."""

    texts: list[tuple[int, ...]] = field(default_factory=list)  # tokens that are to be guessed
    num_right: int = 0
    loss: float = 0.0  # sum over texts of the mean over their tokens


class Captions:
    """Teacher-forced captions of all languages, a batch at a time.

    Packed as in training, every token from those before it; all captions of an image read its
    vision tokens in one pass.
    """

    def __init__(self, decoder: Decoder, encoder: Encoder):
        self.decoder, self.encoder = decoder, encoder
        self._head: Tensor | None = None
        self._found: dict[str, _Tally] = {}

    def add(
        self,
        captions: Sequence[Mapping[str, str]],  # language -> caption, of each image
        vision: Tensor,  # (S, Dv) un-pooled tokens of all images
        vision_lengths: Sequence[int],
    ) -> None:
        """Guess the captions of a batch of images."""
        texts = [
            [_task_text(text, self.encoder, self.decoder.config.length) for text in said.values()]
            for said in captions
        ]
        packed = pack_texts(
            texts, vision_lengths, mask_id=self.decoder.mask_id, device=vision.device
        )
        if not len(packed.counted):
            return
        hidden = self.decoder(packed.texts, vision)[packed.counted]
        losses, is_right = self._scores(hidden, packed.target[packed.counted])
        flat = [text.ids[text.prefix :] for image in texts for text in image]
        lengths = [len(tokens) for tokens in flat]
        languages = [language for said in captions for language in said]
        of_texts = (losses.split(lengths), is_right.split(lengths))
        for language, tokens, loss, right in zip(languages, flat, *of_texts, strict=True):
            tally = self._found.setdefault(language, _Tally())
            tally.texts.append(tokens)
            tally.loss += float(loss.mean())
            tally.num_right += int(right.sum())

    def _scores(
        self,
        hidden: Tensor,  # (n, D)
        target: Tensor,  # (n,)
    ) -> tuple[
        Tensor, Tensor
    ]:  # (n,) float64 losses, (n,) bool: is the likeliest token; on the CPU
        if self._head is None:  # cast once: it is the largest matrix
            self._head = self.decoder.head.to(hidden.dtype)
        parts, bias = [], self.decoder.head_bias
        most = _MOST_LOGITS_CPU if hidden.device.type == "cpu" else _MOST_LOGITS
        size = max(1, most // len(self._head))
        for h, t in zip(hidden.split(size), target.split(size), strict=True):
            logits = h @ self._head.T
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = logits if bias is None else logits + bias
            loss = F.cross_entropy(logits, t, reduction="none")
            parts.append((loss.double().cpu(), (logits.argmax(-1) == t).cpu()))
        losses, is_right = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(is_right)

    def result(self, train_captions: Iterable[Mapping[str, str]] | None = None) -> dict[str, Any]:
        """Numbers of each language, and their mean over the well covered ones.

        Args:
            train_captions: What the baselines' tokens are the commonest of. None takes the
                captions guessed here: the most that such a guess can reach.
        """
        seen = {x: tally.texts for x, tally in self._found.items()}
        if train_captions is not None:
            seen = self._tokens(train_captions)
        fallback = [text for texts in seen.values() for text in texts]
        languages = {
            x: _numbers(tally, seen.get(x) or fallback)
            for x, tally in sorted(self._found.items(), key=lambda item: -len(item[1].texts))
        }
        most = max((values["num_texts"] for values in languages.values()), default=0)
        for values in languages.values():
            values["in_mean"] = values["num_texts"] >= MIN_COVERAGE * most
        counted = [values for values in languages.values() if values["in_mean"]]
        names = ("accuracy", "loss", "unigram", "by_place")
        mean = {x: sum(values[x] for values in counted) / len(counted) for x in names if counted}
        return {
            "languages": languages,
            "mean": {**mean, "num_languages": len(counted)},
            "baseline": "evaluated" if train_captions is None else "training",
        }

    def _tokens(self, captions: Iterable[Mapping[str, str]]) -> dict[str, list[tuple[int, ...]]]:
        seen: dict[str, list[tuple[int, ...]]] = {}
        for said in captions:
            for language, caption in said.items():
                text = _task_text(caption, self.encoder, self.decoder.config.length)
                seen.setdefault(language, []).append(text.ids[text.prefix :])
        return seen


def constant_accuracy(
    texts: Sequence[tuple[int, ...]], seen: Sequence[tuple[int, ...]], *, by_place: bool
) -> float:
    """Share of the tokens of `texts` that are the commonest of `seen`.

    Args:
        by_place: The commonest at each place, where `seen` has one, in place of one for all.
    """
    common = Counter(token for text in seen for token in text)
    places: dict[int, Counter[int]] = {}
    for text in seen if by_place else ():
        for place, token in enumerate(text):
            places.setdefault(place, Counter())[token] += 1
    anywhere = _commonest(common)
    guess = {place: _commonest(tokens) for place, tokens in places.items()}
    right = sum(
        token == guess.get(place, anywhere) for text in texts for place, token in enumerate(text)
    )
    return right / max(1, sum(map(len, texts)))


def _commonest(tokens: Counter[int]) -> int | None:
    return max(tokens, key=lambda token: (tokens[token], -token), default=None)


def _numbers(tally: _Tally, seen: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    num_tokens = sum(map(len, tally.texts))
    return {
        "num_texts": len(tally.texts),
        "num_tokens": num_tokens,
        "accuracy": tally.num_right / num_tokens,
        "loss": tally.loss / len(tally.texts),
        "unigram": constant_accuracy(tally.texts, seen, by_place=False),
        "by_place": constant_accuracy(tally.texts, seen, by_place=True),
    }


def _task_text(caption: str, encoder: Encoder, length: int) -> TaskText:
    [text] = task_texts(ImageTexts(caption), encoder, length)
    return text
